"""A learning rate for each arm, chosen on a seed of its own before the paired seeds run.

A choice is made once: it stands in chosen.json beside the runs that it was made from, and in
lr_grid.json of the sweep. A rate that diverges is a result, and loses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simvq_moe.errors import ConfigError
from simvq_moe.files.of_runs import SUMMARY
from simvq_moe.files.regular import read_json, write_json
from simvq_moe.records.catalogue import metric
from simvq_moe.sweeps.plan import PROCESS, PlannedRun, RateGrid, SweepPlan, run_of

FOLDER = "lr_grid"


def grid_runs(plan: SweepPlan) -> list[PlannedRun]:
    """The runs of every arm whose rate is not chosen yet; none without a grid.

    Raises:
        ConfigError: an arm has begun its paired seeds without a grid, or with another one.
    """
    grid = plan.spec.lr_grid
    if grid is None:
        return []
    rates = chosen(plan)
    runs = []
    for first in _one_of_each_arm(plan):
        arm = f"{first.group}/{first.arm}"
        if arm in rates:
            _check_same(plan, arm, rates[arm], grid)
            continue
        if begun := [r for r in _of_arm(plan, first) if r.folder.exists()]:
            raise ConfigError(
                f"lr_grid: {begun[0].folder} began without a grid: give the sweep another name, or "
                "remove that arm's folder"
            )
        runs += [_grid_run(plan, first, factor) for factor in grid.factors]
    return runs


def choose(plan: SweepPlan, runs: Sequence[PlannedRun]) -> None:
    """Choose the rate of every arm of these grid runs, which have ended, and write it down.

    Raises:
        ConfigError: the outcome is not among the final numbers.
    """
    grid = plan.spec.lr_grid
    assert grid is not None
    for first in _one_of_each_arm(plan):
        if (first.group, first.arm) not in {(run.group, run.arm) for run in runs}:
            continue
        outcome = grid.outcome or plan.spec.groups[first.group].outcomes[0]
        values = {f: _value(_grid_run(plan, first, f), outcome) for f in grid.factors}
        factor = best(values, higher=metric(outcome).better == "higher")
        lr = first.config.optimizer.lr * factor
        rate = {"factor": factor, "lr": lr, "seed": grid.seed, "outcome": outcome}
        rate["values"] = {f"{f:g}": value for f, value in values.items()}
        write_json(_file(plan, first), rate, apart=PROCESS)
        tried = ", ".join(
            f"x{f:g} {'failed' if v is None else f'{v:.4g}'}" for f, v in values.items()
        )
        edge = factor in (min(values), max(values)) and len(values) > 2
        print(
            f"lr_grid  {first.group}/{first.arm}: x{factor:g} of {outcome} {tried}"
            f"{'; the end of the grid, a wider one may be better' if edge else ''}",
            file=sys.stderr,
        )
    write_json(plan.folder / f"{FOLDER}.json", chosen(plan), apart=PROCESS)


def best(values: dict[float, float | None], *, higher: bool) -> float:
    """The factor with the best value, the smaller of two alike; 1 where every run failed."""
    found = {f: value for f, value in sorted(values.items()) if value is not None}
    if not found:
        return 1.0
    return max(found, key=lambda f: found[f] if higher else -found[f])


def chosen(plan: SweepPlan) -> dict[str, dict[str, Any]]:
    """The rates that are chosen already, by group/arm."""
    if plan.spec.lr_grid is None:
        return {}
    files = {f"{run.group}/{run.arm}": _file(plan, run) for run in _one_of_each_arm(plan)}
    return {arm: read_json(file, dict) for arm, file in files.items() if file.is_file()}


def with_rates(plan: SweepPlan) -> SweepPlan:
    """The plan with the rates that are chosen already."""
    rates = chosen(plan)
    return replace(plan, runs=[_with_rate(run, rates) for run in plan.runs])


def _with_rate(run: PlannedRun, rates: dict[str, dict[str, Any]]) -> PlannedRun:
    rate = rates.get(f"{run.group}/{run.arm}")
    if rate is None:
        return run
    optimizer = replace(run.config.optimizer, lr=rate["lr"])
    return replace(run, config=replace(run.config, optimizer=optimizer))


def _check_same(plan: SweepPlan, arm: str, rate: dict[str, Any], grid: RateGrid) -> None:
    tried = [f"{factor:g}" for factor in grid.factors]
    if (rate["seed"], list(rate["values"])) != (grid.seed, tried):
        raise ConfigError(
            f"lr_grid: the rate of {arm} was chosen on seed {rate['seed']} of factors "
            f"{', '.join(rate['values'])}, not on seed {grid.seed} of {', '.join(tried)}: put them "
            f"back, or give the sweep another name than {plan.spec.name}"
        )


def _value(run: PlannedRun, outcome: str) -> float | None:
    if run.status != "finished":
        return None
    summary = read_json(run.folder / SUMMARY, dict)
    if outcome not in summary:
        raise ConfigError(
            f"lr_grid.outcome {outcome!r} is not in {run.folder / 'summary.json'}: use one of "
            f"{', '.join(name for name in summary if metric(name).better)}"
        )
    return summary[outcome]


def _grid_run(plan: SweepPlan, like: PlannedRun, factor: float) -> PlannedRun:
    assert plan.spec.lr_grid is not None
    # from the arm's own rate, whatever has been chosen since
    optimizer = replace(like.config.optimizer, lr=like.config.optimizer.lr * factor)
    folder = f"{FOLDER}/{like.group}/{like.arm}/x{factor:g}"
    config = replace(like.config, optimizer=optimizer)
    return run_of(plan.spec, like.group, like.arm, plan.spec.lr_grid.seed, config, folder)


def _file(plan: SweepPlan, run: PlannedRun) -> Path:
    return plan.folder / FOLDER / run.group / run.arm / "chosen.json"


def _one_of_each_arm(plan: SweepPlan) -> list[PlannedRun]:
    return list({(run.group, run.arm): run for run in reversed(plan.runs)}.values())[::-1]


def _of_arm(plan: SweepPlan, like: PlannedRun) -> list[PlannedRun]:
    return [run for run in plan.runs if (run.group, run.arm) == (like.group, like.arm)]
