"""What is imported when: nobody waits for a package that is not used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import simvq_moe
from tests.launching import environment

SMALL_IMAGES = (
    *("--data.crops", "8", "--data.held_out_crops", "8", "--data.image_size", "16"),
    *("--train.batch_size", "8", "--image_tokenizer.hidden", "8"),
)
REPORT = """
import json, os, sys
there = set(sys.modules)
{code}
names = {{name.partition(".")[0] for name in set(sys.modules) - there}}
print(json.dumps(sorted(names - sys.stdlib_module_names)))
"""


def brings(code: str, cwd: Path) -> set[str]:
    """The packages, beside those of Python, that a statement imports in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", REPORT.format(code=code)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_and_its_version_and_help_come_without_torch(tmp_path: Path) -> None:
    code = "\n".join(
        [
            "import simvq_moe",
            "from simvq_moe.cli import main",
            'assert main(["--version"]) == main(["--help"]) == 0',
        ]
    )
    assert brings(code, tmp_path) == {"simvq_moe"}


def test_public_names_bring_torch_and_little_else(tmp_path: Path) -> None:
    code = "\n".join(
        [
            "import torch, numpy, jaxtyping, safetensors.torch",
            "there = set(sys.modules)",
            "from simvq_moe import *",
        ]
    )
    assert brings(code, tmp_path) == {"simvq_moe"}


def test_every_public_name_is_there_and_no_other() -> None:
    assert all(getattr(simvq_moe, name) for name in simvq_moe.__all__)
    assert set(simvq_moe.__all__) <= set(dir(simvq_moe))
    assert not hasattr(simvq_moe, "SimVQMoE")


def test_a_run_imports_no_package_of_another_task_or_of_reports(tmp_path: Path) -> None:
    flags = [*SMALL_IMAGES, "--train.steps", "1"]
    code = f'from simvq_moe.cli import main\nassert main(["train", *{flags}]) == 0'
    not_needed = {"matplotlib", "scipy", "torchmetrics", "transformers", "datasets", "jinja2"}
    brought = brings(code, tmp_path)
    assert not brought & (not_needed | {"huggingface_hub", "rich"})
