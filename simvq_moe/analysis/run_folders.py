"""Run directories as they are on disk, grouped into the comparisons they belong to.

A run may be finished, still going, killed in the middle of a line, broken or never started; all of
them become a `RunRecord`, because a report that drops the failures reports something else. The
files of a run are described in `simvq_moe.runs`; nothing here writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from simvq_moe.analysis.arms import Arm, Group, RunRecord
from simvq_moe.errors import ConfigError
from simvq_moe.files.of_runs import CONFIG, FOLDERS, META, METRICS, SUMMARY, SWEEP
from simvq_moe.files.regular import BrokenFileError, is_inside
from simvq_moe.records.catalogue import names
from simvq_moe.runs.counts import read_held_out_counts
from simvq_moe.runs.files import (
    SavedConfig,
    read_config,
    read_meta,
    read_metrics,
    read_summary,
    shown,
)
from simvq_moe.runs.sweep_file import SavedArm, SavedRun, read_sweep

ENDED = ("finished", "failed", "interrupted")
BROKEN = "broken"
"""Status of a run with a file that can't be read."""
FILES = {CONFIG, META, METRICS}
"""A folder that has two of them is a run."""

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """What there is in some folders."""

    groups: list[Group]
    broken: list[RunRecord]
    """Runs and sweeps that can't be read and so belong to no group."""


def find(paths: Sequence[Path], baseline: str | None = None) -> Found:
    """The comparisons in sweeps and run directories at or below the paths, in that order.

    Args:
        paths: sweeps, runs, or folders of them.
        baseline: arm, or folder of a run, that runs without a sweep are compared with; None: the
            first run that was given, or the first arm by name in a folder of runs.

    Raises:
        ConfigError: a path does not exist, there is no run in it or none that can be read, or no
            run is the baseline's.
    """
    groups: list[Group] = []
    broken: list[RunRecord] = []
    loose: dict[str, Path] = {}
    for directory, is_sweep in _sweeps_and_runs(paths):
        inside = [directory]
        if is_sweep:
            try:
                groups += _read_sweep(directory)
                continue
            except BrokenFileError as error:
                broken.append(_broken(directory, error))
            # its runs are compared like others
            inside = [path for path, _ in run_folders(directory) if path != directory]
        for path in inside:
            loose.setdefault(os.path.realpath(path), path)
    runs = [read_record(directory) for directory in loose.values()]
    broken += [run for run in runs if run.status == BROKEN]
    runs = [run for run in runs if run.status != BROKEN]
    if broken and not groups and not runs:
        raise ConfigError(broken[0].error)
    named = {os.path.realpath(path) for path in paths}
    return Found(groups + _group_loose(runs, named, baseline), broken)


def _sweeps_and_runs(paths: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """`run_folders` of all, each once, without the runs below a sweep."""
    seen: set[str] = set()
    for path in paths:
        if not os.path.exists(path):
            raise ConfigError(f"{path} does not exist: give a run directory or a folder of runs")
        found = list(run_folders(path))
        if not found:
            raise ConfigError(
                f"no runs found in {path}: a run directory holds config.yaml and metrics.jsonl"
            )
        sweeps = {folder for folder, is_sweep in found if is_sweep}
        for folder, is_sweep in found:
            real = os.path.realpath(folder)
            if real not in seen and sweeps.isdisjoint(folder.parents):
                yield folder, is_sweep
            seen.add(real)


def run_folders(path: Path) -> Iterator[tuple[Path, bool]]:
    """Run directories and sweeps, for which it is True, at or below a path, in the order of their
    names; links to folders are not followed."""
    for name, folders, files in os.walk(path):
        entries = {*folders, *files}
        is_run = len(FILES & entries) > 1
        if SWEEP in entries or is_run:
            yield Path(name), SWEEP in entries
        folders[:] = sorted(f for f in folders if not (is_run and f in FOLDERS))


def read_record(
    path: Path, *, arm: str | None = None, planned: dict[str, Any] | None = None
) -> RunRecord:
    """The run in a directory, whatever is there of it.

    Args:
        path: the run directory.
        arm: name of its arm; None: as its config says.
        planned: the sweep's entry for it (seed and status), which knows of runs that were killed.
    """
    planned = planned or {}
    broken: list[str] = []
    left_out: list[str] = []
    config, saved = _unless(broken, ({}, SavedConfig()), read_config, path)
    meta = _unless(broken, {}, read_meta, path)
    metrics = _unless(broken, [], read_metrics, path)
    summary = _unless(broken, {}, read_summary, path)
    layers = meta.get("layers") or []
    counts = _unless(left_out, None, lambda p: read_held_out_counts(p, layers), path)
    status = BROKEN if broken else _status(path, meta, planned)
    evaluations = [m for m in metrics if any(key.startswith("val/") for key in m)]
    seeds = (planned.get("seed"), saved.seed, meta.get("seed"), 0)
    return RunRecord(
        path=path,
        arm=arm or saved.arm or saved.name or shown(path.name),
        seed=next(seed for seed in seeds if seed is not None),
        status=status,
        error=broken[0] if broken else _error(path, status, meta),
        config=config,
        meta=meta,
        metrics=tuple(metrics),
        final=summary or dict(evaluations[-1] if evaluations else {}),
        held_out_counts=counts,
        samples=_samples(path),
        left_out=tuple(left_out),
    )


def _unless(broken: list[str], otherwise: T, read: Callable[[Path], T], path: Path) -> T:
    """What a reader finds; where the file is broken that is noted, and nothing is found."""
    try:
        return read(path)
    except BrokenFileError as error:
        broken.append(str(error))
        return otherwise


def _error(path: Path, status: str, meta: dict[str, Any]) -> str | None:
    if status == "finished":
        return None
    if not meta.get("error") and status == "failed":
        return f"no error recorded: see {shown(path.name)}/launcher.log and log.txt"
    return meta.get("error")


def _status(path: Path, meta: dict[str, Any], planned: dict[str, Any]) -> str:
    """What became of it. A killed run still says "running"; its sweep may know better."""
    if (path / SUMMARY).is_file():
        return "finished"
    if not path.is_dir():
        return "missing" if planned.get("status") in (None, "finished") else planned["status"]
    if meta.get("status") in ENDED:
        return meta["status"]
    if planned.get("status") in ("failed", "interrupted"):
        return planned["status"]
    if not meta and (path / "launcher.log").is_file():
        return "failed"
    return meta.get("status") or "pending"


def _samples(path: Path) -> tuple[Path, ...]:
    folder = path / "samples"
    return tuple(sorted(folder.glob("val_*"))) if is_inside(folder, path) else ()


def _broken(path: Path, error: BrokenFileError) -> RunRecord:
    return RunRecord(path=path, arm=shown(path.name), seed=0, status=BROKEN, error=str(error))


def _read_sweep(directory: Path) -> list[Group]:
    sweep = read_sweep(directory)
    return [
        Group(
            name=group.name,
            question=group.question,
            baseline=group.baseline,
            outcomes=tuple(group.outcomes),
            primary=dict(group.primary or {}),
            predictions=tuple(sweep.predictions or ()),
            registered=tuple(sweep.registered or ()),
            tuned=any(arm.lr is not None for arm in group.arms),
            arms=tuple(_read_arm(directory, arm) for arm in group.arms),
            notes=group.notes or "",
            config=group.config or "",
            sweep=sweep.title or sweep.name,
            command=sweep.command or "",
        )
        for group in sweep.groups
    ]


def _read_arm(directory: Path, arm: SavedArm) -> Arm:
    runs = (_read_planned(directory, arm.name, run) for run in arm.runs)
    return Arm(
        name=arm.name,
        label=arm.label or arm.name,
        control=arm.control,
        runs=tuple(sorted(runs, key=lambda run: run.seed)),
    )


def _read_planned(directory: Path, arm: str, run: SavedRun) -> RunRecord:
    path = directory / run.dir
    if not is_inside(path, directory):
        error = BrokenFileError(path, f"is a link out of {directory}: its target is not read")
        return replace(_broken(path, error), arm=arm, seed=run.seed)
    return read_record(path, arm=arm, planned=run.model_dump())


def _group_loose(runs: Sequence[RunRecord], named: set[str], baseline: str | None) -> list[Group]:
    """One group a task. Nobody registered a baseline before the runs, and the group says so.

    Args:
        named: real paths that the user gave.
        baseline: the arm, or the folder of a run, that the user gave.
    """
    tasks: dict[str, list[RunRecord]] = {}
    for run in runs:
        task = run.config.get("task") or run.meta.get("task") or "unknown"
        tasks.setdefault(str(task), []).append(run)
    tasks = {task: _distinct(tasks[task]) for task in sorted(tasks)}
    every = [run for of_task in tasks.values() for run in of_task]
    if baseline is not None and not any(_is(run, baseline) for run in every):
        known = ", ".join(sorted({run.arm for run in every})) or "none, beside those of sweeps"
        raise ConfigError(f"--baseline {baseline} is no arm of these runs: they are {known}")
    return [_group_of(task, of_task, named, baseline) for task, of_task in tasks.items()]


def _group_of(task: str, runs: Sequence[RunRecord], named: set[str], baseline: str | None) -> Group:
    names = sorted({run.arm for run in runs})
    first, why = names[0], "it sorts first"
    if os.path.realpath(runs[0].path) in named:
        first, why = runs[0].arm, "it was given first"
    if asked := next((run.arm for run in runs if baseline and _is(run, baseline)), None):
        first, why = asked, "--baseline names it"
    arms = tuple(
        Arm(
            name=name,
            label=name,
            control=False,
            runs=tuple(sorted((r for r in runs if r.arm == name), key=lambda r: r.seed)),
        )
        for name in dict.fromkeys([first, *names])
    )
    return Group(
        name=task,
        question=f"How do the runs of {task} compare?",
        baseline=first,
        outcomes=_outcomes(runs),
        arms=arms,
        notes=f"Runs without a sweep: grouped by arm; the baseline is {first} because {why}, not "
        "by a choice made before the runs.",
    )


def _is(run: RunRecord, name: str) -> bool:
    """Whether a name that the user gave means this run: that of its arm, or its folder."""
    return name in (run.arm, run.path.name) or os.path.realpath(name) == os.path.realpath(run.path)


def _distinct(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs of the same arm and seed are told apart by their folder, so that none is lost."""
    keys = [(run.arm, run.seed) for run in runs]
    for tell in (lambda run: shown(run.path.name), lambda run: shown(str(run.path))):
        again = [keys.count(key) > 1 for key in keys]
        keys = [
            (f"{run.arm} ({tell(run)})", run.seed) if twice else key
            for run, key, twice in zip(runs, keys, again, strict=True)
        ]
    return [replace(run, arm=arm) for run, (arm, _) in zip(runs, keys, strict=True)]


def _outcomes(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    """The first known held-out error that any run has, and for codes the used share."""
    found = {name for run in runs for name in run.final}
    errors = [name for name in names("outcome") if name in found][:1]
    return (*(errors or ["val/loss"]), *({"val/codes/used"} & found))
