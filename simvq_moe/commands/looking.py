"""`report`, `dashboard`, `watch`, `recipes`, `init`, `doctor`: what is there, what it says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from simvq_moe.config.checks_values import check_text
from simvq_moe.config.flags import parse_flags
from simvq_moe.config.ranges import Range
from simvq_moe.errors import ConfigError


@dataclass(frozen=True)
class ReportArgs:
    """Write report.html, report.json and report.md of runs or sweeps."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, sweep directories, or folders that hold some."""
    out: Path
    """Folder of the report."""
    baseline: str | None = None
    """Arm, or folder of a run, that runs without a sweep are compared with; None: that of the first
    path, or the first arm by name where the path is a folder of runs."""


def report(args: Sequence[str]) -> int:
    """Compare runs: report.html, report.json, report.md."""
    options = parse_flags(ReportArgs, args, "simvq-moe report")
    if not options.paths:
        raise ConfigError("report needs runs: simvq-moe report RUN_OR_FOLDER ... --out FOLDER")
    from simvq_moe.reports import report as reports

    found = reports.report(options.paths, options.out, options.baseline)
    print(found.table)
    print(f"report: {found.html}", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class DashboardArgs:
    """Serve TensorBoard with the usage of codes and experts on 127.0.0.1."""

    runs_dir: tyro.conf.Positional[Path] = Path("runs")
    """Folder of runs."""
    port: Annotated[int, Range(0, 65_535)] = 6006
    """Port; 0 takes a free one."""


def dashboard(args: Sequence[str]) -> int:
    """Watch usage live in TensorBoard on 127.0.0.1."""
    options = parse_flags(DashboardArgs, args, "simvq-moe dashboard")
    from simvq_moe.reports import dashboard as tensorboard

    return tensorboard.serve(options.runs_dir, options.port)


@dataclass(frozen=True)
class WatchArgs:
    """A live table of runs in the terminal: progress, loss, usage, dead slots, time left."""

    runs_dir: tyro.conf.Positional[Path] = Path("runs")
    """Folder of runs."""
    once: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print every run once and stop, as where standard output is no terminal."""


def watch(args: Sequence[str]) -> int:
    """Watch runs live in the terminal."""
    options = parse_flags(WatchArgs, args, "simvq-moe watch")
    from simvq_moe.reports import watch as watching

    return watching.watch(options.runs_dir, once=options.once)


@dataclass(frozen=True)
class RecipesArgs:
    """List the configs and sweeps that come with the package, as `--config` takes their names."""


def recipes(args: Sequence[str]) -> int:
    """List recipes with their question, hardware, minutes and numbers."""
    parse_flags(RecipesArgs, args, "simvq-moe recipes")
    from simvq_moe.config.recipes import recipes as all_recipes

    for recipe in all_recipes():
        said = (recipe.question, recipe.hardware, f"Expect: {recipe.expect}")
        print("\n  ".join([recipe.name, *said]), end="\n\n")
    return 0


@dataclass(frozen=True)
class InitArgs:
    """Copy a recipe to a file of your own, or the launch scripts to a folder of your own."""

    recipe: tyro.conf.Positional[str] = ""
    """Its name, which `simvq-moe recipes` lists; `launch`: the scripts for launchers and SLURM."""
    out: Path | None = None
    """The file; None: that of the recipe, here, or the folder launch/."""


def init(args: Sequence[str]) -> int:
    """Copy a recipe, or the launch scripts, to a file or folder of your own."""
    options = parse_flags(InitArgs, args, "simvq-moe init")
    from simvq_moe.config.recipes import SCRIPTS, copy_out, copy_scripts

    if not options.recipe:
        raise ConfigError(f"init needs a recipe or {SCRIPTS!r}: simvq-moe recipes lists them")
    if options.recipe == SCRIPTS:
        folder = options.out or Path(SCRIPTS)
        copy_scripts(folder)
        print(f"init: {folder}/; {folder}/local.sh 2 --config RECIPE starts a run", file=sys.stderr)
        return 0
    out = options.out or Path(f"{Path(options.recipe).stem}.yaml")
    check_text("--out", str(out))  # the header of the copy names it
    command = copy_out(options.recipe, out)
    print(f"init: {out}; it runs by {command or f'--config {out}'}", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class DoctorArgs:
    """Check versions, devices, DeepSpeed and data, and say what to do where something is off."""


def doctor(args: Sequence[str]) -> int:
    """Check this machine: versions, devices, DeepSpeed, data, offline state."""
    parse_flags(DoctorArgs, args, "simvq-moe doctor")
    from simvq_moe import diagnosis

    return diagnosis.doctor()
