"""What keeps a sweep from being run, found before anything is written, in one line that names the
group and the arm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

from simvq_moe.config.checks_values import name_problems
from simvq_moe.config.loading import suggestion
from simvq_moe.config.ranges import SEED
from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError
from simvq_moe.records.catalogue import find, held_out_names
from simvq_moe.sweeps.registration import unknown

if TYPE_CHECKING:
    from simvq_moe.sweeps.plan import GroupSpec, PlannedRun, SweepSpec

GIVEN_BY_THE_SWEEP = ("name", "arm", "seed", "runs_dir")
"""Keys of a config that a run has from its place in the sweep."""
BESIDE_GROUPS = ("lr_grid", "configs")
"""Folders of a sweep that no group may be called."""


def check_spec(spec: SweepSpec, origin: str) -> None:
    """Raise `ConfigError` for the first problem of a sweep by itself."""
    for problem in _problems(spec):
        raise ConfigError(f"{origin}: {problem}")


def check_outcomes(spec: SweepSpec, configs: Mapping[tuple[str, str], Config], origin: str) -> None:
    """Raise `ConfigError` for the first outcome that no run logs; plug-ins may log what they like.

    Args:
        configs: by group and arm.
    """
    for name, group in spec.groups.items():
        if any(config.plugins for (of, _), config in configs.items() if of == name):
            continue
        for outcome in group.outcomes:
            if find(outcome) is None:
                raise ConfigError(
                    f"{origin}: groups.{name}.outcomes {outcome!r} is no measure of a run."
                    f"{suggestion(outcome, held_out_names())} docs/metrics.md lists them"
                )


def check_runs(
    runs: Sequence[PlannedRun], origin: str, check: Callable[[Config, int], None], ranks: int
) -> None:
    """Raise `ConfigError` for the first run that would not start, with its group and arm."""
    for run in runs:
        try:
            check(run.config, ranks)
        except ConfigError as error:
            raise ConfigError(f"{origin}: groups.{run.group}.arms.{run.arm}: {error}") from None


def _problems(spec: SweepSpec) -> Iterator[str]:
    yield from name_problems("name", spec.name, parts=1)
    if not spec.groups:
        yield "groups {}: give one or more"
    if not spec.seeds:
        yield "seeds []: give one or more, such as [0, 1]"
    yield from _seed_problems("seeds", spec.seeds)
    if len(set(spec.seeds)) < len(spec.seeds):
        yield f"seeds {list(spec.seeds)}: one is there twice: leave it out"
    if problem := unknown(spec.predictions):
        yield f"predictions {problem}"
    yield from _set_problems("set", spec.set)
    for name, group in spec.groups.items():
        yield from name_problems("groups", name, parts=1)
        if name in BESIDE_GROUPS:
            yield f"groups.{name}: {name!r} is a folder of records: use another name"
        yield from _group_problems(f"groups.{name}", group)
    yield from _grid_problems(spec)


def _group_problems(key: str, group: GroupSpec) -> Iterator[str]:
    for arm, one in group.arms.items():
        yield from name_problems(f"{key}.arms", arm, parts=1)
        yield from _set_problems(f"{key}.arms.{arm}.set", one.set)
    yield from _set_problems(f"{key}.set", group.set)
    if group.baseline not in group.arms:
        known = ", ".join(group.arms) or "an arm that you add"
        yield f"{key}.baseline {group.baseline!r} is no arm: use one of {known}"
    if not group.outcomes:
        yield f"{key}.outcomes []: name a measure, such as val/loss"
    for arm, outcome in group.primary.items():
        others = [name for name in group.arms if name != group.baseline]
        if arm not in others:
            yield f"{key}.primary.{arm} is no arm beside the baseline: use {' or '.join(others)}"
        if outcome not in group.outcomes:
            yield (
                f"{key}.primary.{arm} {outcome!r} is none of {key}.outcomes "
                f"{list(group.outcomes)}: add it there"
            )


def _set_problems(key: str, overrides: dict[str, Any]) -> Iterator[str]:
    for name in GIVEN_BY_THE_SWEEP:
        if name in overrides:
            yield f"{key}.{name} {overrides[name]!r}: the sweep gives each run its {name}: drop it"


def _grid_problems(spec: SweepSpec) -> Iterator[str]:
    grid = spec.lr_grid
    if grid is None:
        return
    yield from _seed_problems("lr_grid.seed", [grid.seed])
    if grid.seed in spec.seeds:
        yield f"lr_grid.seed {grid.seed} is one of the paired seeds {list(spec.seeds)}: use another"
    if not grid.factors or not all(0 < factor < inf for factor in grid.factors):
        yield f"lr_grid.factors {list(grid.factors)} must be positive: use [0.3, 1, 3] or the like"
    if len({f"{factor:g}" for factor in grid.factors}) < len(grid.factors):
        yield f"lr_grid.factors {list(grid.factors)}: one is there twice: leave it out"


def _seed_problems(key: str, seeds: Sequence[int]) -> Iterator[str]:
    for seed in seeds:
        if not 0 <= seed <= SEED:
            yield f"{key} {seed}: use 0 to {SEED:,}"
