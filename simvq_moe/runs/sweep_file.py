"""What sweep.json, the plan of a sweep, holds, and readers that let nothing else through."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from simvq_moe.files.of_runs import SWEEP
from simvq_moe.files.regular import read_json
from simvq_moe.runs.files import SMALL, Content, Line, Seed


def _relative(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise ValueError("must be a folder below that of sweep.json")
    return path


class ListedRun(Content):
    """A run of a sweep: where it is, if it has begun."""

    dir: Annotated[str, AfterValidator(_relative)]


class ListedArm(Content):
    runs: list[ListedRun]


class ListedGroup(Content):
    arms: list[ListedArm]


class ListedRuns(Content):
    """sweep.json as far as a watcher needs it."""

    groups: list[ListedGroup]


class SavedRun(ListedRun):
    seed: Seed
    status: Line | None = None


class SavedArm(Content):
    """An arm in sweep.json."""

    name: Line
    label: Line = ""
    control: bool = False
    lr: dict[Line, Any] | None = None
    runs: list[SavedRun]

    @model_validator(mode="after")
    def _check(self) -> SavedArm:
        _unique("seed", [run.seed for run in self.runs])
        return self


class SavedGroup(Content):
    """A group in sweep.json."""

    name: Line
    question: Line = ""
    config: Line | None = None
    baseline: Line
    outcomes: list[Line]
    primary: dict[Line, Line] | None = None
    notes: Line | None = None
    arms: list[SavedArm]

    @model_validator(mode="after")
    def _check(self) -> SavedGroup:
        names = [arm.name for arm in self.arms]
        _unique("arm", names)
        if self.baseline not in names:
            raise ValueError(f"its baseline {self.baseline!r} is none of its arms")
        return self


class Stamp(Content):
    """A file that says beforehand what a sweep is to show, as it was when its runs began."""

    file: Line
    """The sweep's file, or the one that has the rules of its predictions."""
    commit: Line | None = None
    """The commit of its last change; None: it is in no repository of git, or was not committed."""
    date: Line | None = None
    """When that was, in ISO 8601."""


class SavedSweep(Content):
    """sweep.json, as `simvq_moe.sweeps.plan.write_plan` writes it."""

    name: Line = ""
    title: Line | None = None
    command: Line | None = None
    predictions: list[Line] | None = None
    registered: list[Stamp] | None = None
    groups: Annotated[list[SavedGroup], Field(min_length=1)]


def _unique(what: str, values: list[Any]) -> None:
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"{what} {twice!r} stands there twice")


def read_plan(folder: Path) -> list[Path]:
    """Folders of the runs that a sweep.json plans."""
    plan = read_json(folder / SWEEP, ListedRuns, limit=SMALL, inside=folder)
    return [folder / run.dir for group in plan.groups for arm in group.arms for run in arm.runs]


def read_sweep(folder: Path) -> SavedSweep:
    """sweep.json."""
    return read_json(folder / SWEEP, SavedSweep, limit=SMALL, inside=folder)
