"""Dependencies run one way: a room of the package knows no room above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.launching import ROOT

MODELS = {"core", "quantizers", "moe", "models"}
RUNS = {"config", "engine", "runs"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "extras": set(),
    "text_table": set(),
    "files": set(),
    "core": set(),
    "hub": {"config", "files"},
    "config": {"files"},
    "quantizers": {"core", "config", "hub"},
    "moe": {"core", "config", "hub"},
    "data": {"files", "config"},
    "models": {"config", "core", "quantizers", "moe", "hub"},
    "integrations": {"core", "config", "files", "records"},
    "engine": {"files", "config", *MODELS},
    "runs": {"files", "config", "engine", "data", *MODELS},
    "records": {"extras", "files", "text_table", *RUNS, *MODELS},
    "tasks": {"files", "data", "records", *RUNS, *MODELS},
    "costs": {"text_table", "config", "engine", "tasks", *MODELS},
    "training": {"files", "data", "records", "tasks", "costs", *RUNS, *MODELS},
    "inference": {"hub", "files", "data", "records", "tasks", "training", *RUNS, *MODELS},
    "sweeps": {"files", "config", "records", "runs", "analysis"},
    "analysis": {"files", "records", "runs"},
    "usage_tab": {"core", "data", "files", "records", "runs", "analysis"},
    "reports": {"files", "text_table", "records", "runs", "analysis", "usage_tab"},
    "benchmarks": {
        *("text_table", "files", "data", "records", "tasks", "costs", "training", "sweeps"),
        *(*RUNS, *MODELS),
    },
}
"""What a room may know beside itself and `errors`; one that is not named here stands on top and may
know all."""
EXCEPTIONS = {
    ("analysis", "simvq_moe.core.ids"),
    ("analysis", "simvq_moe.core.usage"),
    ("analysis", "simvq_moe.moe.routing_measures"),
}
"""Run folders are read with the same measures that wrote them."""
PACKAGE = ROOT / "simvq_moe"


def imports(file: Path) -> set[str]:
    """The modules of the package that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if is_module(name) else node.module for name in inner}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("simvq_moe.")}


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def files_of(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_is_below_it(room: str) -> None:
    known = {name for above, name in EXCEPTIONS if above == room}
    for file in files_of(room):
        for name in imports(file) - known:
            allowed = MAY_IMPORT[room] | {room, "errors"}
            assert name.split(".")[1] in allowed, f"{file.name} imports {name}"


def test_no_arrow_is_excused_that_nobody_draws() -> None:
    for room, name in EXCEPTIONS:
        assert any(name in imports(file) for file in files_of(room)), f"{room} -> {name}"


def test_every_room_says_what_lives_in_it_and_what_does_not() -> None:
    for folder in PACKAGE.iterdir():
        if (folder / "__init__.py").exists():
            text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
            assert text, f"{folder.name}/__init__.py says nothing"
            assert len(list(folder.glob("*.py"))) <= 18, f"{folder.name} has too many files"
