"""What is settled before a run begins: the resolved config, the folder, and what is resumed.

It is found out once and handed on. Whatever keeps a run from starting is a `ConfigError` here,
before anything is written.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, replace

from simvq_moe.config.checks import check, check_ranks
from simvq_moe.config.checks_moe import with_gates
from simvq_moe.config.schema import Config
from simvq_moe.engine.launched import launched_rank
from simvq_moe.engine.settings import engine_settings
from simvq_moe.records.trackers.guarded import check_trackers
from simvq_moe.runs.folder import RunFolder, check_same_run, claimed, has_summary
from simvq_moe.tasks.registry import task_of


@dataclass(frozen=True)
class Preflight:
    """A run that may begin, or has nothing left to do, as this rank has found it."""

    config: Config
    """The config with what its data say, checked."""
    folder: RunFolder | None = None
    """The run's folder, on rank 0, which has it."""
    steps_before: int | None = None
    """Steps that its run was to have so far; None: it is new, or this is not rank 0."""
    finished: bool = False
    """Whether there is nothing to do; rank 0's alone."""


def resolved(config: Config) -> Config:
    """The config with what its data say of it.

    Raises:
        ConfigError: it can't run, whatever the number of ranks.
    """
    config = with_gates(task_of(config).fit_to_data(config))
    check(config)
    return config


def check_settings(config: Config, ranks: int) -> None:
    """Raise `ConfigError` for a resolved config that can't run on so many ranks."""
    check_ranks(config, ranks)
    check_trackers(config.train.trackers)
    engine_settings(config, ranks)


def check_start(config: Config) -> None:
    """Raise `ConfigError` where data, networks of the loss or the folder are not as a resolved
    config needs them."""
    task_of(config).check_files(config)
    check_same_run(config)


def check_launch(config: Config, ranks: int) -> None:
    """Raise `ConfigError` for whatever would keep this config from running on so many ranks."""
    config = resolved(config)
    check_settings(config, ranks)
    check_start(config)


def prepare(config: Config, held: contextlib.ExitStack) -> Preflight:
    """Check what a resolved config needs here; rank 0 takes the folder.

    Args:
        held: the folder is taken for as long as it is open.
    """
    task_of(config).check_files(config)
    if launched_rank() != 0:
        return Preflight(config)
    found = _look(config)
    if not found.finished:
        folder = held.enter_context(claimed(config.run_dir))
        # another process may have been there since
        found = replace(_look(config), folder=folder)
    if found.finished:
        print(f"{config.run_dir} is finished: nothing to do", file=sys.stderr)
    return found


def _look(config: Config) -> Preflight:
    saved = check_same_run(config)
    steps = None if saved is None else saved.train.steps
    finished = has_summary(config.run_dir) and steps in (None, config.train.steps)
    return Preflight(config, steps_before=steps, finished=finished)
