"""Dependencies run one way: a lower layer of the package knows no higher one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.launching import ROOT

MAY_IMPORT = {
    "core": {"core"},
    "quantizers": {"core", "quantizers", "hub"},
    "moe": {"core", "moe", "hub"},
    "models": {"core", "quantizers", "moe", "models", "hub"},
    "integrations": {"core", "integrations"},
    "data": {"data", "config", "merging"},
    "training": {
        *("core", "quantizers", "moe", "models", "data", "training"),
        *("config", "config_checks", "config_checks_moe", "merging"),
    },
    "analysis": {"analysis", "config", "config_checks_values", "merging"},
}
FOR_ALL = {"errors", "files", "plain_yaml", "conversion", "run_files", "tensor_files"}
"""Imported by every part."""
EXCEPTIONS = {
    "analysis": {
        *("simvq_moe.core.usage", "simvq_moe.moe.measures", "simvq_moe.training.progress"),
    }
}
"""Run directories are read with the same measures and times that wrote them."""
PACKAGE = ROOT / "simvq_moe"


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("simvq_moe")}


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_what_is_below_it(part: str) -> None:
    for file in (PACKAGE / part).rglob("*.py"):
        for name in imports(file) - EXCEPTIONS.get(part, set()):
            allowed = MAY_IMPORT[part] | FOR_ALL
            assert name.split(".")[1] in allowed, f"{file.name} imports {name}"
