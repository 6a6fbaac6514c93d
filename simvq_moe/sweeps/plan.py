"""The plan of a sweep: arms x paired seeds, and what has become of each run.

What is done already is read from the folders of the runs, so that the same command always goes on
from where it stopped. A failed run stays in the plan and in the report as failed.
"""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from simvq_moe.config.conversion import shown
from simvq_moe.config.loading import merge_files, suggestion, with_overrides
from simvq_moe.config.recipes import recipe_file
from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError
from simvq_moe.files.of_runs import SWEEP
from simvq_moe.files.regular import write_json
from simvq_moe.runs.folder import status_of
from simvq_moe.runs.sweep_file import Stamp
from simvq_moe.sweeps.checks import check_outcomes, check_spec

PROCESS = f"{socket.gethostname()}-{os.getpid()}-"
"""Tells the tasks of a job array apart, which may write the same file at the same time."""


@dataclass(frozen=True)
class ArmSpec:
    """One arm: what it changes in the group's config."""

    label: str
    """Name in tables."""
    control: bool = False
    """Whether the arm is there to explain another arm's effect."""
    set: dict[str, Any] = field(default_factory=dict)
    """Overrides of the config, nested by section."""


@dataclass(frozen=True)
class GroupSpec:
    """Arms that answer one question."""

    question: str
    """The question, in a sentence."""
    config: str
    """The config that all arms share: a file, relative to the sweep's, or a recipe's name."""
    baseline: str
    """Arm that the others are compared with."""
    outcomes: tuple[str, ...]
    """Measures that every arm is compared on, named before anything runs."""
    arms: dict[str, ArmSpec]
    """Arms by name."""
    primary: dict[str, str] = field(default_factory=dict)
    """The arms that decide the question, each with its outcome: the tests of Holm's adjustment.
    Empty: every outcome of every arm."""
    set: dict[str, Any] = field(default_factory=dict)
    """Overrides for every arm of the group."""
    notes: str = ""
    """What a reader must know, such as conventions that all arms share."""


@dataclass(frozen=True)
class RateGrid:
    """Learning rates that each arm is tried with, on a seed of its own, before the paired seeds."""

    seed: int
    """Seed of these runs; none of the paired ones, so that no outcome has a say in its own rate."""
    factors: tuple[float, ...]
    """Factors on optimizer.lr."""
    outcome: str = ""
    """Measure that the best factor is best in; empty: the first outcome of each group."""


@dataclass(frozen=True)
class SweepSpec:
    """A sweep."""

    name: str
    """Folder under runs_dir."""
    title: str
    """Title of the report."""
    groups: dict[str, GroupSpec]
    """Groups by name."""
    seeds: tuple[int, ...]
    """Paired seeds: the same initial weights and data order in every arm."""
    predictions: tuple[str, ...] = ()
    """Numbers of the registered predictions that its runs test, such as P8; `simvq-moe report`
    judges these and no others."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    lr_grid: RateGrid | None = None
    """Chooses each arm's learning rate first; None: every arm has its config's."""
    set: dict[str, Any] = field(default_factory=dict)
    """Overrides for every run."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of the plan."""

    group: str
    arm: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    @property
    def name(self) -> str:
        """Its folder within the sweep's."""
        return self.config.name.partition("/")[2]

    @property
    def status(self) -> str:
        """finished, failed, interrupted, running or pending, from the run's own records."""
        return status_of(self.folder)


@dataclass(frozen=True)
class SweepPlan:
    """Every run of a sweep, in the order in which they are done."""

    spec: SweepSpec
    files: Sequence[Path]
    runs: list[PlannedRun]
    arms: tuple[str, ...] = ()
    """The arms that the sweep was restricted to, as they were asked for; empty: all."""

    @property
    def folder(self) -> Path:
        return Path(self.spec.runs_dir) / self.spec.name


def plan(files: Sequence[Path], arms: Sequence[str] = ()) -> SweepPlan:
    """The runs of a sweep file; later files are merged on top.

    Seeds are outermost, so that an unfinished sweep has whole pairs.

    Args:
        files: the sweep's YAML files.
        arms: only these arms and their baselines: names in any group, or group/arm. Empty: all.

    Raises:
        ConfigError: an unknown key, a baseline that is no arm, an arm that is in no group, or a
            config that does not load.
    """
    spec = merge_files(SweepSpec, files)
    origin = origin_of(files)
    check_spec(spec, origin)
    spec = _restricted(spec, arms)
    configs = {
        (name, arm): config
        for name, group in spec.groups.items()
        for arm, config in _configs(spec, name, group, recipe_file(files[0]).parent, origin).items()
    }
    check_outcomes(spec, configs, origin)
    runs = [
        run_of(spec, group, arm, seed, config)
        for seed in spec.seeds
        for (group, arm), config in configs.items()
    ]
    return SweepPlan(spec, files, runs, tuple(arms))


def origin_of(files: Sequence[Path]) -> str:
    """The files of a sweep, as an error names them."""
    return " + ".join(map(str, files))


def _restricted(spec: SweepSpec, arms: Sequence[str]) -> SweepSpec:
    """The sweep with these arms and their baselines alone, and without groups that have none."""
    if not arms:
        return spec
    known = {
        name for g, group in spec.groups.items() for a in group.arms for name in (a, f"{g}/{a}")
    }
    for arm in arms:
        if arm not in known:
            raise ConfigError(
                f"--arms {arm!r} is in no group.{suggestion(arm, sorted(known))} They are "
                f"{', '.join(sorted({a for group in spec.groups.values() for a in group.arms}))}"
            )
    groups = {}
    for name, group in spec.groups.items():
        named = [arm for arm in group.arms if arm in arms or f"{name}/{arm}" in arms]
        if named:
            kept = {a: one for a, one in group.arms.items() if a in (*named, group.baseline)}
            primary = {a: outcome for a, outcome in group.primary.items() if a in kept}
            groups[name] = replace(group, arms=kept, primary=primary)
    return replace(spec, groups=groups)


def _configs(
    spec: SweepSpec, name: str, group: GroupSpec, folder: Path, origin: str
) -> dict[str, Config]:
    key = f"{origin}: groups.{name}"
    try:
        beside = folder / group.config
        file = beside if beside.exists() else Path(group.config)
        base = merge_files(Config, [file], plugins=True)
    except ConfigError as error:
        raise ConfigError(f"{key}.config {shown(group.config)}: {error}") from None
    for where, overrides in ((f"{origin}: set", spec.set), (f"{key}.set", group.set)):
        base = with_overrides(base, overrides, where)
    return {
        arm: with_overrides(base, one.set, f"{key}.arms.{arm}.set")
        for arm, one in group.arms.items()
    }


def run_of(
    spec: SweepSpec, group: str, arm: str, seed: int, config: Config, folder: str = ""
) -> PlannedRun:
    """A run of an arm's config in its folder of the sweep's, group/arm/seed unless given."""
    name = f"{spec.name}/{folder or f'{group}/{arm}/seed{seed}'}"
    config = replace(config, name=name, runs_dir=spec.runs_dir, arm=arm, seed=seed)
    return PlannedRun(group, arm, seed, config)


def write_plan(
    plan: SweepPlan,
    options: Sequence[str] = (),
    registered: Sequence[Stamp] = (),
    rates: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """sweep.json: the groups, arms and runs, for the report.

    Args:
        options: what the command had beside the sweep's files and arms.
        registered: what was written down beforehand.
        rates: learning rates that a grid has chosen, by group/arm.
    """
    arms = ("--arms", ",".join(plan.arms)) if plan.arms else ()
    configs = [word for file in plan.files for word in ("--config", str(file))]
    grid = plan.spec.lr_grid
    content = {
        "name": plan.spec.name,
        "title": plan.spec.title,
        "command": shlex.join(["simvq-moe", "sweep", *configs, *arms, *options]),
        "predictions": list(plan.spec.predictions),
        "registered": [stamp.model_dump() for stamp in registered],
        **({} if grid is None else {"lr_grid": asdict(grid)}),
        "groups": [_group(plan, name, rates or {}) for name in plan.spec.groups],
    }
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_json(plan.folder / SWEEP, content, apart=PROCESS)


def _group(plan: SweepPlan, name: str, rates: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    group = plan.spec.groups[name]
    arms = [
        {
            "name": arm,
            "label": spec.label,
            "control": spec.control,
            "overrides": _dotted(spec.set),
            **({"lr": dict(rates[f"{name}/{arm}"])} if f"{name}/{arm}" in rates else {}),
            "runs": [
                {
                    "seed": run.seed,
                    "dir": str(run.folder.relative_to(plan.folder)),
                    "status": run.status,
                }
                for run in plan.runs
                if run.group == name and run.arm == arm
            ],
        }
        for arm, spec in group.arms.items()
    ]
    return {
        "name": name,
        "question": group.question,
        "config": group.config,
        "baseline": group.baseline,
        "outcomes": list(group.outcomes),
        "primary": dict(group.primary),
        "notes": group.notes,
        "arms": arms,
    }


def _dotted(overrides: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        if isinstance(value, dict):
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def share(
    runs: Sequence[PlannedRun], index: int, count: int, *, whole_arms: bool
) -> list[PlannedRun]:
    """What task `index` of `count` does: every count-th run, or every run of every count-th arm."""
    if not whole_arms:
        return list(runs[index::count])
    arms = list(dict.fromkeys((run.group, run.arm) for run in runs))
    own = arms[index::count]
    return [run for run in runs if (run.group, run.arm) in own]
