"""Evidence for or against a prediction: differences of arms over the seeds that both finished.

Arms are known by their resolved configs, never by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from simvq_moe.analysis import stats
from simvq_moe.analysis.arms import UNCOMPARED_KEYS, Arm, Group, RunRecord
from simvq_moe.analysis.outcomes import value
from simvq_moe.analysis.results import Evidence
from simvq_moe.records.catalogue import label

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"


def arms_with(group: Group, wanted: Mapping[str, Any]) -> list[Arm]:
    """Arms whose config has all of these."""
    return [
        a for a in group.arms if wanted.items() <= {k: config_of(a).get(k) for k in wanted}.items()
    ]


def arm_like(group: Group, arm: Arm, changes: Mapping[str, Any]) -> Arm | None:
    """The arm of the group that has these changes of another arm's config, and no other.

    A learning rate that a grid has chosen for each arm is no change. Where a kind changes, options
    that only one of the two kinds has are none either.
    """
    tuned = {"optimizer.lr": None} if group.tuned else {}
    before = config_of(arm)
    wanted = before | dict(changes) | tuned
    of_kinds = tuple(
        key.removesuffix("kind")
        for key, value in changes.items()
        if key.endswith(".kind") and before.get(key) != value
    )
    return next((a for a in group.arms if _agree(config_of(a) | tuned, wanted, of_kinds)), None)


def _agree(config: Mapping[str, Any], wanted: Mapping[str, Any], of_kinds: Sequence[str]) -> bool:
    """Whether two configs are equal but for options below these keys that only one of them has."""
    both = config.keys() & wanted.keys()
    rest = config.keys() ^ wanted.keys()
    equal = all(config[key] == wanted[key] for key in both)
    return equal and all(key.startswith(tuple(of_kinds)) for key in rest)


def config_of(arm: Arm) -> dict[str, Any]:
    config = next((run.config for run in arm.runs if run.config), {})
    return {key: v for key, v in config.items() if key not in UNCOMPARED_KEYS}


def by_seed(arm: Arm, number: Callable[[RunRecord], float | None]) -> dict[int, float]:
    return {run.seed: x for run in arm.runs if (x := number(run)) is not None}


def difference(
    group: Group, arm: Arm, other: Arm, metric: str, margin: float | None = None
) -> Evidence:
    """An arm minus another, over the seeds that both finished."""
    runs = [by_seed(one, lambda r: value(r, metric)) for one in (arm, other)]
    numbers = {s: x - runs[1][s] for s, x in runs[0].items() if s in runs[1]}
    text = f"{label(metric)}, {arm.label} minus {other.label}"
    return evidence_of(group, text, metric, [arm, other], numbers, margin)


def evidence_of(
    group: Group,
    text: str,
    metric: str,
    arms: Sequence[Arm],
    numbers: Mapping[int, float],
    margin: float | None = None,
) -> Evidence:
    found = stats.compare(list(numbers.values()), margin)
    few = found.n < stats.LEAST_PAIRS
    return Evidence(
        group=group.name,
        text=text,
        metric=metric,
        arms=[arm.name for arm in arms],
        seeds=list(numbers),
        values=list(numbers.values()),
        n=found.n,
        mean=found.mean,
        interval=found.interval,
        p=found.p,
        margin=margin,
        p_equivalent=found.p_equivalent,
        verdict=UNDECIDED,
        pairs_needed=stats.LEAST_PAIRS if few else None,
    )


def decided_by_sign(one: Evidence, sign: int) -> Evidence:
    """Supported or contradicted by the sign of the mean, if p allows it."""
    if one.n < stats.LEAST_PAIRS or one.p is None or one.p >= stats.LEVEL:
        return one
    return replace(one, verdict=SUPPORTED if sign * one.mean > 0 else CONTRADICTED)


def decided_within(one: Evidence) -> Evidence:
    """Supported or contradicted by where the interval lies; equal values have none but the mean."""
    if one.n < stats.LEAST_PAIRS or one.margin is None:
        return one
    low, high = one.interval or (one.mean, one.mean)
    if -one.margin < low and high < one.margin:
        return replace(one, verdict=SUPPORTED)
    if low > one.margin or high < -one.margin:
        return replace(one, verdict=CONTRADICTED)
    return with_power(one, (1 - stats.CONFIDENCE) / 2)


def with_power(one: Evidence, level: float) -> Evidence:
    """Undecided evidence about a margin, with the pairs that could decide it.

    Args:
        level: of each of the two one-sided tests.
    """
    needed = stats.pairs_for_margin(stats.mean_sd(one.values)[1], one.margin or 0.0, level)
    few = needed is None or one.n < needed
    return replace(one, verdict=UNDECIDED, pairs_needed=needed if few else None)
