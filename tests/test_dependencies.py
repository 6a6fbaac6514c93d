"""What the package imports is declared, and the base works without what the extras bring."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from simvq_moe.extras import EXTRAS
from tests.launching import ROOT, environment

BASE = {"torch", "numpy", "jaxtyping", "safetensors", "huggingface_hub"}
WITH_TORCH = {"triton"}
"""Comes with a CUDA build of torch."""
BLOCKED = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *args):
        there = name.partition(".")[0] not in {names!r}
        return self.finder.find_spec(name, *args) if there else None
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
{code}
"""
"""A program in a process where some packages are not installed."""


def declared() -> dict[str, set[str]]:
    """Names of distributions by extra; those of the base by ""."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = {"": project["dependencies"], **project["optional-dependencies"]}
    return {
        extra: {normal(re.split(r"[\s<>=;\[]", one)[0]) for one in needs}
        for extra, needs in every.items()
    }


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    found: set[str] = set()
    for file in (ROOT / "simvq_moe").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
            elif isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
    return found - sys.stdlib_module_names - {"simvq_moe"}


def test_whatever_is_imported_is_declared() -> None:
    needs, homes = declared(), importlib.metadata.packages_distributions()
    assert imported() - WITH_TORCH <= BASE | EXTRAS.keys()
    for name in imported() - WITH_TORCH:
        extra = EXTRAS.get(name, "")
        homes_of = {normal(one) for one in homes.get(name, [name])}
        assert homes_of & needs[extra], f"{name} in {extra or 'base'}"


def without_extras(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    names = EXTRAS.keys() - {"typing_extensions"}  # torch's own need
    return subprocess.run(
        [sys.executable, "-c", BLOCKED.format(names=names, code=code)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


USE = """
import torch
from simvq_moe import *
from simvq_moe.cli import main
from simvq_moe.core.bank import Bank
quantizers = [VQ(8, 4), EMAVQ(8, 4), SimVQ(8, 4), FSQ([3, 3, 3, 3]), LFQ(4)]
for q in [*quantizers, ResidualQuantizer([VQ(8, 4), VQ(8, 4)])]:
    out = q(torch.randn(2, 5, 4))
    assert q.decode(out.ids).shape == out.z_q.shape
q.save_pretrained("saved")
assert isinstance(ResidualQuantizer.from_pretrained("saved"), ResidualQuantizer)
layer = MoE(width=4, hidden=8, experts=4, top_k=2)
layer(torch.randn(2, 5, 4)).sum().backward()
assert layer.usage.sum() == 20
usage(layer.usage)
assert Bank(torch.randn(4, 4)).rows().shape == (4, 4)
assert main(["--version"]) == 0
"""
"""A program that needs the base alone."""


def test_the_base_works_alone_and_a_missing_extra_is_one_line(tmp_path: Path) -> None:
    done = without_extras(f'{USE}\nsys.exit(main(["train"]))', tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "simvq-moe: tyro is not installed: pip install 'simvq-moe[train]'\n"
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]
