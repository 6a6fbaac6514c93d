"""`train` and `sweep`."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from simvq_moe.config.flags import parse_flags, parse_known_flags, with_flags
from simvq_moe.config.loading import merge_files
from simvq_moe.config.ranges import Count
from simvq_moe.config.schema import Config
from simvq_moe.errors import FAILED, ConfigError
from simvq_moe.terminal import unheard


@dataclass(frozen=True)
class TrainArgs:
    """What `train` takes beside the fields of the config."""

    config: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A YAML file such as those in configs/; give it again to merge another on top."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved config and what the run would cost, and stop."""
    cluster: Path | None = None
    """With --dry-run, the machines to predict the step time on: a YAML file such as those in
    configs/clusters/."""
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The same as --train.profile True: trace a few steps, for TensorBoard and Perfetto."""


def train(args: Sequence[str]) -> int:
    """Train one run, or resume it: --config F [--config F2] [--section.key value ...]."""
    # a field of the config is a flag as well, so unknown flags and --help are the config's
    options, flags = parse_known_flags(TrainArgs, args, "simvq-moe train", add_help=False)
    prog = "simvq-moe train [--config FILE ...] [--profile] [--dry-run [--cluster FILE]]"
    config = merge_files(Config, options.config, plugins=True)
    config = with_flags(config, flags, prog, _of_its_task)
    if options.profile:
        config = replace(config, train=replace(config.train, profile=True))
    if options.cluster is not None and not options.dry_run:
        raise ConfigError(f"--cluster {options.cluster} is for predictions: add --dry-run")
    if options.dry_run:
        from simvq_moe.training.dry_run import dry_run

        dry_run(config, options.cluster)
        return 0
    from simvq_moe.records.trackers.guarded import left_alone
    from simvq_moe.training import run

    before = left_alone()
    with unheard():
        code = run.train(config)
    if left_alone() - before:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _of_its_task(config: Config, task: str | None) -> Collection[str]:
    """The fields of a config that mean something to its task, or to the one that a flag names."""
    from simvq_moe.config.tasks import without_other_tasks

    return without_other_tasks(replace(config, task=task or config.task))


@dataclass(frozen=True)
class SweepArgs:
    """Run every arm of a sweep with every seed, skip what is finished, and report."""

    config: tyro.conf.UseAppendAction[tuple[Path, ...]]
    """A sweep, such as configs/sweeps/quickstart.yaml; give it again to merge another on top."""
    ranks: int = 1
    """Processes of a run."""
    parallel: int = 1
    """Runs at a time, which share cores and GPUs."""
    launcher: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start runs of several processes by the deepspeed launcher, as always on GPUs, and on CPUs
    once for all that follow each other; else runs on CPUs are forked from one process that has
    imported everything."""
    arms: str = ""
    """Only these arms and their baselines, as in "vq,simvq" or "codes_512/vq"; empty: all."""
    index: int = 0
    """This task of a job array, from 0: it does every count-th run, or arm with a lr_grid."""
    count: Count = 1
    """Tasks of the job array; the last to end reports."""


def sweep(args: Sequence[str]) -> int:
    """Run arms x paired seeds, resume broken ones, end with the report."""
    options = parse_flags(SweepArgs, args, "simvq-moe sweep")
    from simvq_moe import forked_run, launcher_slot
    from simvq_moe.reports import report
    from simvq_moe.sweeps import checks, execute, machine, rate_grid
    from simvq_moe.sweeps import plan as sweeps
    from simvq_moe.training.preflight import check_launch

    if not options.config:
        raise ConfigError("sweep needs --config FILE, such as configs/sweeps/quickstart.yaml")
    if not 0 <= options.index < options.count:
        raise ConfigError(f"--index {options.index} must be 0 to --count {options.count} less 1")
    here = machine.this_machine(options.ranks, options.parallel)
    arms = [arm.strip() for arm in options.arms.split(",")] if options.arms else []
    plan = sweeps.plan(options.config, arms)
    runs = (*rate_grid.grid_runs(plan), *rate_grid.with_rates(plan).runs)
    origin = sweeps.origin_of(options.config)
    checks.check_runs(runs, origin, check_launch, options.ranks)
    forks = forked_run.can_fork(here, [run.config for run in runs])
    with launcher_slot.Slots() as slots:
        by_launcher = slots if forks and options.ranks > 1 else machine.launched
        starter = forked_run.forked if forks and not options.launcher else by_launcher
        with unheard():
            own = execute.execute(plan, here, options.index, options.count, starter=starter)
    complete = all(run.status == "finished" for run in own)
    if any(run.status in ("pending", "running") for run in plan.runs):
        print(
            f"the other tasks' runs go on; after them: simvq-moe report {plan.folder} "
            f"--out {plan.folder / 'report'}",
            file=sys.stderr,
        )
        return 0 if complete else FAILED
    found = report.report([plan.folder], plan.folder / "report")
    print(found.table)
    print(f"report: {found.html}", file=sys.stderr)
    return 0 if complete else FAILED
