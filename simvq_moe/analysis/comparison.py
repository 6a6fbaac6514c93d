"""From runs to results: values, means, pairs with the baseline, nulls.

A value enters means and pairs only if its run finished: an average of half-trained and trained
runs is of neither. Unfinished runs stay visible in their status, in the curves and in the list of
runs. A seed that is missing on either side of a comparison makes no pair and is listed.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simvq_moe.analysis import stats
from simvq_moe.analysis.arms import UNCOMPARED_KEYS, Arm, Group, RunRecord
from simvq_moe.analysis.beforehand import registrations
from simvq_moe.analysis.curves import curves_of, loads_of, profiles_of
from simvq_moe.analysis.outcomes import held_out_tokens, value
from simvq_moe.analysis.predictions import check_all
from simvq_moe.analysis.results import (
    ArmResult,
    GroupResult,
    Null,
    Paired,
    Results,
    RunResult,
)
from simvq_moe.analysis.routings import routings_of
from simvq_moe.analysis.spectra import spectra_of
from simvq_moe.analysis.verdict import negative, secondary, verdict
from simvq_moe.core.usage import null_usage
from simvq_moe.files.regular import printable
from simvq_moe.records.catalogue import (
    HELD_OUT,
    OF_TASKS,
    compared_leaves,
    find,
    metric,
    names,
    router_leaves,
    usage_leaves,
)
from simvq_moe.runs.counts import MOST_DRAWS

TASK_MEASURES = 100
"""Measures of tasks that a report has."""
MOST_NULL_SLOTS = 2**22
"""Slots for which even chance is drawn, at most: it takes minutes for more."""


def compute(groups: Sequence[Group], out: Path, broken: Sequence[RunRecord] = ()) -> Results:
    """Compute everything that a report in `out` shows about the groups.

    Args:
        broken: runs that can't be read and so belong to no group.
    """
    titles = [title for title in dict.fromkeys(group.sweep for group in groups) if title]
    return Results(
        title=" · ".join(titles) or "Runs",
        predictions=check_all(groups),
        registered=registrations(groups),
        groups=group_results(groups),
        runs=[
            *(
                _run_result(g, arm.name, run, out)
                for g in groups
                for arm in g.arms
                for run in arm.runs
            ),
            *(_run_result(None, run.arm, run, out) for run in broken),
        ],
    )


def group_results(groups: Sequence[Group]) -> list[GroupResult]:
    """The numbers of each comparison."""
    measured = [_measure(group) for group in groups]
    adjusted = _adjust(groups, [one.paired for one in measured])
    return [
        _group_result(group, replace(one, paired=paired))
        for group, one, paired in zip(groups, measured, adjusted, strict=True)
    ]


@dataclass(frozen=True)
class _Measured:
    """A group's values and pairs."""

    kind: str | None
    seeds: list[int]
    arms: list[ArmResult]
    paired: list[Paired]


def _measure(group: Group) -> _Measured:
    kind = _kind(group)
    seeds = sorted({run.seed for arm in group.arms for run in arm.runs})
    leaves = usage_leaves("table") if kind else []
    leaves += router_leaves("routers") if kind == "experts" else []
    measured = [HELD_OUT[kind or "codes"] + leaf for leaf in leaves]
    outcomes = [*group.outcomes, *group.primary.values()]
    metrics = list(dict.fromkeys([*outcomes, *measured, *names("costs"), *_of_tasks(group)]))
    arms = [_arm_result(group, arm, seeds, metrics) for arm in group.arms]
    extra = [HELD_OUT[kind] + name for name in compared_leaves()] if kind else []
    return _Measured(kind, seeds, arms, _pair(group, arms, seeds, extra))


def _of_tasks(group: Group) -> list[str]:
    """What tasks of lm-eval have measured on its runs, the first of too many."""
    found = {name for arm in group.arms for run in arm.runs for name in run.final if find(name)}
    return sorted(name for name in found if name.startswith(OF_TASKS))[:TASK_MEASURES]


def _group_result(group: Group, measured: _Measured) -> GroupResult:
    kind, arms, paired = measured.kind, measured.arms, measured.paired
    left_out = [line for arm in group.arms for run in arm.runs for line in run.left_out]
    return GroupResult(
        name=group.name,
        sweep=group.sweep,
        question=group.question,
        notes=group.notes,
        config=group.config,
        command=group.command,
        warnings=unequal_lengths(group),
        verdict=verdict(arms, group.outcomes, group.primary, paired),
        secondary=secondary(arms, group.outcomes, group.primary, paired),
        negative=negative(arms, group.outcomes, paired),
        kind=kind,
        baseline=group.baseline,
        outcomes=list(group.outcomes),
        primary=dict(group.primary),
        pairs_needed=stats.pairs_needed(max([1, *(pair.tests for pair in paired)])),
        seeds=measured.seeds,
        arms=arms,
        null=_nulls(group, kind),
        paired=paired,
        curves=curves_of(group, kind),
        loads=loads_of(group) if kind == "experts" else [],
        profiles=profiles_of(group) if kind else [],
        routings=routings_of(group, left_out),
        spectra=spectra_of(group, left_out),
        left_out=left_out,
    )


def _kind(group: Group) -> str | None:
    kinds = (layer["kind"] for arm in group.arms for run in arm.runs for layer in run.layers)
    return next((kind for kind in kinds if kind in HELD_OUT), None)


def _arm_result(group: Group, arm: Arm, seeds: Sequence[int], metrics: Sequence[str]) -> ArmResult:
    by_seed = {run.seed: run for run in arm.runs}
    ended = [run for run in arm.runs if run.status == "finished"]
    values = {
        name: [value(by_seed[s], name) if s in by_seed else None for s in seeds] for name in metrics
    }
    summary = {
        name: stats.mean_sd([v for v in row if v is not None]) for name, row in values.items()
    }
    baseline = next((a for a in group.arms if a.name == group.baseline), None)
    return ArmResult(
        name=arm.name,
        label=arm.label,
        control=arm.control,
        baseline=arm.name == group.baseline,
        n=len(ended),
        status=[by_seed[s].status if s in by_seed else "not planned" for s in seeds],
        values=values,
        mean={name: mean for name, (mean, _) in summary.items()},
        sd={name: sd for name, (_, sd) in summary.items()},
        differs=_config_differences(baseline, arm) if baseline else {},
    )


def _pair(
    group: Group, arms: Sequence[ArmResult], seeds: Sequence[int], extra: Sequence[str]
) -> list[Paired]:
    """Every arm against the baseline, primary tests first."""
    baseline = next((arm for arm in arms if arm.baseline), None)
    if baseline is None:
        return []
    metrics = list(dict.fromkeys([*group.outcomes, *group.primary.values(), *extra]))
    pairs = [
        _compare(arm, baseline, name, seeds, primary=_is_primary(group, arm.name, name))
        for name in metrics
        for arm in arms
        if not arm.baseline
    ]
    return sorted(pairs, key=lambda pair: not pair.primary)


def _adjust(groups: Sequence[Group], paired: Sequence[Sequence[Paired]]) -> list[list[Paired]]:
    """The pairs with Holm over each family of tests: all that a sweep named primary in any of its
    groups; in a group that named none, all of its outcomes."""
    families: dict[object, list[tuple[int, int]]] = {}
    for g, group in enumerate(groups):
        family = group.sweep if group.primary and group.sweep else g
        tests = [(g, i) for i, pair in enumerate(paired[g]) if pair.primary and pair.n]
        families.setdefault(family, []).extend(tests)
    adjusted = [list(pairs) for pairs in paired]
    for tests in families.values():
        for (g, i), p in zip(tests, stats.holm([paired[g][i].p for g, i in tests]), strict=True):
            adjusted[g][i] = replace(paired[g][i], p_holm=p, tests=len(tests))
    return adjusted


def _is_primary(group: Group, arm: str, name: str) -> bool:
    return group.primary.get(arm) == name if group.primary else name in group.outcomes


def _compare(
    arm: ArmResult, baseline: ArmResult, name: str, seeds: Sequence[int], *, primary: bool
) -> Paired:
    differences = [
        None if a is None or b is None else a - b
        for a, b in zip(arm.values[name], baseline.values[name], strict=True)
    ]
    margin = metric(name).margin
    found = stats.compare([d for d in differences if d is not None], margin)
    level, _ = stats.mean_sd(
        [
            b
            for b, d in zip(baseline.values[name], differences, strict=True)
            if b is not None and d is not None
        ]
    )
    return Paired(
        arm=arm.name,
        metric=name,
        primary=primary,
        differences=differences,
        unpaired=[s for s, d in zip(seeds, differences, strict=True) if d is None],
        n=found.n,
        agree=sum(d is not None and d * found.mean > 0 for d in differences),
        mean=found.mean,
        relative=found.mean / level if level else math.nan,
        sd=found.sd,
        interval=found.interval,
        p=found.p,
        p_min=found.p_min,
        p_holm=None,
        tests=0,
        margin=margin,
        p_equivalent=found.p_equivalent,
    )


def _nulls(group: Group, kind: str | None) -> list[Null]:
    """The null of each (slots, top_k, draws) that finished runs of the group have."""
    arms: dict[tuple[int, int, int], list[str]] = {}
    for arm in group.arms:
        for run in arm.runs:
            if run.layers and (tokens := held_out_tokens(run)) and run.status == "finished":
                layer = run.layers[0]
                if layer["slots"] > MOST_NULL_SLOTS or tokens * layer["top_k"] > MOST_DRAWS:
                    continue
                key = (int(layer["slots"]), int(layer["top_k"]), tokens)
                arms.setdefault(key, [])
                arms[key] += [] if arm.name in arms[key] else [arm.name]
    nulls, start = [], HELD_OUT[kind or "codes"]
    for (slots, top_k, tokens), arm_names in arms.items():
        draws = tokens * top_k
        expected = null_usage(slots, draws).as_dict()
        nulls.append(
            Null(
                arms=arm_names,
                slots=slots,
                top_k=top_k,
                tokens=tokens,
                draws=draws,
                ceiling=1 - math.exp(-draws / slots),
                values={start + leaf: expected[leaf] for leaf in usage_leaves("table")},
            )
        )
    return nulls


def _config_differences(baseline: Arm, arm: Arm) -> dict[str, list[Any]]:
    def config(one: Arm) -> dict[str, Any]:
        return next((run.config for run in one.runs if run.config), {})

    old, new = config(baseline), config(arm)
    if not old or not new:
        return {}
    return {
        key: [old.get(key), new.get(key)]
        for key in sorted(old.keys() | new.keys())
        if key not in UNCOMPARED_KEYS and old.get(key) != new.get(key)
    }


def unequal_lengths(group: Group) -> list[str]:
    """A sentence where finished runs that are compared did not train for as many steps."""
    by_steps: dict[int, list[str]] = {}
    for arm in group.arms:
        for run in arm.runs:
            if run.status == "finished" and run.step:
                labels = by_steps.setdefault(run.step, [])
                labels += [] if arm.label in labels else [arm.label]
    if len(by_steps) < 2:
        return []
    parts = [f"{', '.join(by_steps[steps])} {steps:,} steps" for steps in sorted(by_steps)]
    return [
        f"Runs of unequal length are compared: {'; '.join(parts)}. What differs may come from that."
    ]


def _run_result(group: Group | None, arm: str, run: RunRecord, out: Path) -> RunResult:
    command = run.meta.get("command") or ""
    versions = run.meta.get("versions") or {}
    environment = {
        "commit": run.meta.get("commit"),
        "device": run.meta.get("device"),
        "processes": run.meta.get("world_size"),
        **versions,
    }
    return RunResult(
        group=group.name if group else "",
        arm=arm,
        seed=run.seed,
        status=run.status,
        error=run.error,
        step=run.step,
        last={n: run.final[n] for n in (group.outcomes if group else ()) if n in run.final},
        path=printable(os.path.relpath(run.path, out)),
        command=command if isinstance(command, str) else shlex.join(map(str, command)),
        environment={key: str(v) for key, v in environment.items() if v is not None},
    )
