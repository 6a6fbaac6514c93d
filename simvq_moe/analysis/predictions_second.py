"""Predictions of the second study: a whitened router input, and fair baselines for codes.

Rules go by Student's t interval of paired differences at 95 %. Exponents are those of C^(-p/2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from simvq_moe.analysis import stats
from simvq_moe.analysis.arms import Arm, Group, RunRecord
from simvq_moe.analysis.evidence import (
    CONTRADICTED,
    SUPPORTED,
    arm_like,
    arms_with,
    by_seed,
    config_of,
    decided_within,
    difference,
    evidence_of,
)
from simvq_moe.analysis.outcomes import value
from simvq_moe.analysis.registered import Registered
from simvq_moe.analysis.results import Evidence

ENTROPY, ERROR = "val/moe/mean/entropy", "val/bits_per_byte"
USED, MSE = "val/codes/used", "val/mse"
GAIN = 0.1
"""Gain of entropy over the centred router."""
NOT_WORSE = 0.005
"""Bits per byte."""
CLOSE = 0.7
"""Rank correlation."""
WHITENED: dict[str, Any] = {
    "moe.router.whiten.kind": "full",
    "moe.router.whiten.exponent": 1.0,
    "moe.router.map.train_base": True,
    "moe.balance.kind": "none",
}
PLAIN: dict[str, Any] = {"moe.router.whiten.kind": "none"}
CENTRED = PLAIN | {"moe.router.centre": True}
LEAST_CODES, MANY_CODES = 512, 8192
NULL = 0.02
"""Entropy."""
EQUAL_TERMS: dict[str, Any] = {
    "language_model.depth_scaled": False,
    "moe.expert_out_map.kind": "linear",
    "moe.balance.kind": "none",
    "optimizer.map_lr_multiplier": 1.0,
}
"""Options of a shared map, as far as the codes of a quantizer have them."""


def above(one: Evidence, bound: float) -> Evidence:
    """Supported or contradicted by the side of the bound on which the whole interval lies; equal
    values have none but the mean."""
    if one.n < stats.LEAST_PAIRS:
        return one
    low, high = one.interval or (one.mean, one.mean)
    if low > bound:
        return replace(one, verdict=SUPPORTED)
    return replace(one, verdict=CONTRADICTED) if high < bound else one


def below(one: Evidence, bound: float) -> Evidence:
    found = above(one, bound)
    swapped = {SUPPORTED: CONTRADICTED, CONTRADICTED: SUPPORTED}
    return replace(found, verdict=swapped.get(found.verdict, found.verdict))


def _evens_out(group: Group) -> list[Evidence]:
    """Arms: a router that whitens its input by the whole covariance and learns its rows, without a
    balance method, against the same router that centres it alone. Measure: held-out entropy, the
    difference. Supported: its interval lies above 0.1. Contradicted: it lies below 0.1."""
    return [
        above(difference(group, arm, centred, ENTROPY), GAIN)
        for arm, centred in _pairs(group, CENTRED)
    ]


def _not_worse(group: Group) -> list[Evidence]:
    """Arms: the whitened router; of the balance methods (aux and loss-free, at all strengths that
    ran) the one with the lowest mean error; the plain router. Measure: held-out bits per byte.
    Supported: the interval of whitened minus best balanced lies below 0.005, and that of whitened
    minus plain below 0. Contradicted: one lies above."""
    found = []
    for arm, plain in _pairs(group, PLAIN):
        balanced = [other for other in group.arms if _is_balanced(other, plain)]
        if balanced:
            best = min(balanced, key=_mean_error)
            found.append(below(difference(group, arm, best, ERROR), NOT_WORSE))
            found.append(below(difference(group, arm, plain, ERROR), 0.0))
    return found


def _rises_with_the_exponent(group: Group) -> list[Evidence]:
    """Arms: whitened routers that differ in the exponent alone, of at most 1. Measure: held-out
    entropy, the difference between each and the next lower one. Supported: every interval lies
    above 0. Contradicted: one lies below 0."""
    of = {
        float(config_of(arm)["moe.router.whiten.exponent"]): arm
        for arm in arms_with(group, {k: v for k, v in WHITENED.items() if "exponent" not in k})
    }
    exponents = sorted(p for p in of if p <= 1)
    return [
        above(difference(group, of[high], of[low], ENTROPY), 0.0)
        for low, high in pairwise(exponents)
    ]


def _needs_directions(group: Group) -> list[Evidence]:
    """Arms: routers whitened by the whole covariance and by the variance of each channel, and the
    centred one. Measure: gain in held-out entropy over the centred one by the diagonal, less two
    thirds of the gain by the whole covariance. Supported: the interval lies below 0. Contradicted:
    it lies above 0."""
    found = []
    for arm, centred in _pairs(group, CENTRED):
        diagonal = arm_like(group, arm, {"moe.router.whiten.kind": "diagonal"})
        if diagonal is None:
            continue
        runs = [by_seed(one, lambda r: value(r, ENTROPY)) for one in (diagonal, arm, centred)]
        shared = [seed for seed in runs[0] if seed in runs[1] and seed in runs[2]]
        numbers = {s: runs[0][s] - runs[2][s] - (runs[1][s] - runs[2][s]) * 2 / 3 for s in shared}
        text = f"entropy gained by {diagonal.label}, less two thirds of what {arm.label} gains"
        arms = [diagonal, arm, centred]
        found.append(below(evidence_of(group, text, ENTROPY, arms, numbers), 0.0))
    return found


def _follows_the_rank(group: Group) -> list[Evidence]:
    """Arms: all whose router scores by products of plain rows, where one of them whitens. Measure:
    in each seed Spearman's rank correlation, over layers and arms, of held-out entropy and the
    effective rank of the logits. Supported: the interval of its mean lies above 0.7. Contradicted:
    it lies below."""
    if not arms_with(group, WHITENED):
        return []
    arms = arms_with(group, {"moe.router.kind": "topk"})
    seeds = sorted({run.seed for arm in arms for run in arm.runs})
    numbers: dict[int, float] = {}
    for seed in seeds:
        runs = [run for arm in arms for run in arm.runs if run.seed == seed]
        points = [point for run in runs for point in _layers(run)]
        # of fewer a rank correlation says nothing
        if len(points) >= 4:
            found: Any = spearmanr(np.array(points))
            rho = float(found.statistic)
            numbers |= {seed: rho} if math.isfinite(rho) else {}
    text = "rank correlation of entropy and the effective rank of the logits, over layers and arms"
    return [above(evidence_of(group, text, ENTROPY, arms, numbers), CLOSE)] if numbers else []


def _stays_null_at_equal_terms(group: Group) -> list[Evidence]:
    """Arms: one linear map after the experts, whose last projections start like other matrices, at
    the learning rate of the rest, against the same without the map. Measure: held-out entropy, the
    difference. Supported: the mean and its interval lie within 0.02 of 0. Contradicted: the
    interval lies wholly outside."""
    return [
        decided_within(difference(group, arm, plain, ENTROPY, NULL))
        for arm in arms_with(group, EQUAL_TERMS)
        if (plain := arm_like(group, arm, {"moe.expert_out_map.kind": "none"})) is not None
    ]


def _sharing_evens_out(group: Group) -> list[Evidence]:
    """Arms: one linear map after the experts against one map for each, as above. Measure: held-out
    entropy, the difference. Supported: its interval lies above 0. Contradicted: it lies below 0."""
    return [
        above(difference(group, arm, separate, ENTROPY), 0.0)
        for arm in arms_with(group, EQUAL_TERMS)
        if (separate := arm_like(group, arm, {"moe.expert_out_map.kind": "separate"})) is not None
    ]


def _restart_uses_as_many(group: Group) -> list[Evidence]:
    """Arms: of 512 codes, EMA with restarts and without a k-means start, and SimVQ as published
    (linear W, frozen rows, no bias, no start from data). Measure: share of the codes in use, the
    difference. Supported: its interval lies above 0. Contradicted: it lies below 0."""
    published: dict[str, Any] = {"quantizer.transform": "linear", "quantizer.train_base": False}
    published |= {"quantizer.bias": False, "quantizer.init": "default"}
    return [
        above(difference(group, restarted, simvq, USED), 0.0)
        for restarted, simvq in _codes(group, LEAST_CODES, published)
    ]


def _data_start_is_not_beaten(group: Group) -> list[Evidence]:
    """Arms: of 8,192 codes, SimVQ started from data, and EMA with restarts and without a k-means
    start. Measure: held-out mean squared error of EMA minus SimVQ. Supported: its interval lies
    above 0. Contradicted: it lies below 0."""
    started: dict[str, Any] = {"quantizer.transform": "linear", "quantizer.init": "data"}
    return [
        above(difference(group, restarted, simvq, MSE), 0.0)
        for restarted, simvq in _codes(group, MANY_CODES, started)
    ]


SECOND = (
    Registered(
        "P8",
        "A whitened router input raises entropy by at least 0.1 over a centred one.",
        "a router whose input is whitened, and the same with its input centred",
        _evens_out,
    ),
    Registered(
        "P9",
        "Its bits per byte are not worse than those of the best balance method by more than 0.005, "
        "and lower than the plain router's.",
        "a router whose input is whitened, the plain one, and balance methods",
        _not_worse,
    ),
    Registered(
        "P10",
        "Entropy rises with the exponent of the whitening up to 1.",
        "whitened routers of several exponents",
        _rises_with_the_exponent,
    ),
    Registered(
        "P11",
        "The variance of each channel alone gets less than two thirds of the gain.",
        "routers whitened by the whole covariance and by its diagonal, and the centred one",
        _needs_directions,
    ),
    Registered(
        "P12",
        "Entropy follows the effective rank of the logits across layers and runs.",
        "a whitened router beside others that score by products",
        _follows_the_rank,
    ),
    Registered(
        "P14, null",
        "With unscaled starts and equal rates a map after all experts leaves entropy within 0.02.",
        "a shared map after the experts and none, with language_model.depth_scaled false",
        _stays_null_at_equal_terms,
    ),
    Registered(
        "P14, sharing",
        "One map for all leaves the experts more even than one map for each.",
        "a shared map after the experts and separate ones, with language_model.depth_scaled false",
        _sharing_evens_out,
    ),
    Registered(
        "P15, use",
        "EMA with restarts uses at least as many of 512 codes as SimVQ.",
        "EMA with quantizer.restart, and SimVQ, of 512 codes",
        _restart_uses_as_many,
    ),
    Registered(
        "P15, error",
        "EMA with restarts is not better than SimVQ from data at 8,192 codes.",
        "EMA with quantizer.restart, and SimVQ with quantizer.init data, of 8,192 codes",
        _data_start_is_not_beaten,
    ),
)


def _pairs(group: Group, changes: dict[str, Any]) -> Iterator[tuple[Arm, Arm]]:
    """Whitened arms, each with the arm that differs from it in these keys alone."""
    for arm in arms_with(group, WHITENED):
        other = arm_like(group, arm, changes)
        if other is not None:
            yield arm, other


def _is_balanced(arm: Arm, plain: Arm) -> bool:
    """Whether it is the plain arm but for a balance method, of any strength."""
    config, wanted = config_of(arm), config_of(plain)
    free = ("moe.balance.kind", "moe.balance.weight", "moe.balance.rate")
    same = all(config.get(key) == v for key, v in wanted.items() if key not in free)
    return (
        same
        and config.get("moe.balance.kind") in ("aux", "loss_free")
        and _mean_error(arm) < math.inf
    )


def _mean_error(arm: Arm) -> float:
    errors = list(by_seed(arm, lambda r: value(r, ERROR)).values())
    return float(np.mean(errors)) if errors else math.inf


def _layers(run: RunRecord) -> Iterator[tuple[float, float]]:
    """Entropy of each layer's use, and effective rank of its logits."""
    for i in range(len(run.layers)):
        pair = [value(run, f"val/moe/{i:02d}/{name}") for name in ("entropy", "logits_rank")]
        if pair[0] is not None and pair[1] is not None:
            yield pair[0], pair[1]


def _codes(group: Group, codes: int, of_simvq: dict[str, Any]) -> Iterator[tuple[Arm, Arm]]:
    """EMA with restarts, and SimVQ of these options, at this number of codes."""
    sized = {"quantizer.codes": codes}
    simvq = arms_with(group, sized | of_simvq | {"quantizer.kind": "simvq"})
    ema = sized | {"quantizer.kind": "ema", "quantizer.init": "default"}
    for restarted in arms_with(group, ema):
        if (config_of(restarted).get("quantizer.restart") or 0) > 0:
            yield from ((restarted, one) for one in simvq)
