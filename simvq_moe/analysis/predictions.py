"""The predictions that were registered before the runs, and what runs say about each.

Arms are known by their resolved configs, never by their names: a prediction on a map compares an
arm that has it with the arm of the same group that differs from it in the named keys and in
nothing else. A sweep names the predictions that it tests (`predictions` of its file); about others
its runs say nothing.

A prediction is about every such case: supported if all of them are, contradicted if one is,
undecided otherwise. A claim that needs two parts needs both, so no p is adjusted for their number
(an intersection-union test; Berger, 1982). Fewer than `LEAST_PAIRS` pairs decide nothing, but for
what has to hold in every single run. Each rule is the docstring of its function, and the report
prints it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace

from simvq_moe.analysis import stats
from simvq_moe.analysis.arms import Arm, Group
from simvq_moe.analysis.beforehand import came_before
from simvq_moe.analysis.evidence import (
    CONTRADICTED,
    SUPPORTED,
    UNDECIDED,
    arm_like,
    arms_with,
    by_seed,
    config_of,
    decided_by_sign,
    decided_within,
    difference,
    evidence_of,
    with_power,
)
from simvq_moe.analysis.outcomes import early, mean_of_banks, value
from simvq_moe.analysis.predictions_keys import OF_KEYS
from simvq_moe.analysis.predictions_second import SECOND
from simvq_moe.analysis.registered import Registered
from simvq_moe.analysis.results import Evidence, Prediction

NOT_TESTED = "not tested"
ENTROPY, MAX_VIO = "val/moe/mean/entropy", "val/moe/mean/max_vio"
ERROR = "val/bits_per_byte"
SMALL_MAX_VIO = 0.1
SMALL_ERROR = 0.005
EARLY = 0.25
"""Share of the steps."""
NO_ROUTER_MAP = {
    "moe.router.map.kind": "none",
    "moe.router.map.train_base": True,
}
WITH_ROUTER_MAP = {
    "moe.router.kind": "topk",
    "moe.router.map.kind": "linear",
    "moe.router.map.train_base": False,
    "moe.balance.kind": "none",
    "moe.router.centre": False,
}


def check_all(groups: Sequence[Group]) -> list[Prediction]:
    """The predictions that these groups registered, each with its verdict about their runs."""
    found = []
    for one in REGISTERED:
        own = [group for group in groups if one.number in group.predictions]
        found += [_checked(one, own)] if own else []
    return found


def _checked(one: Registered, groups: Sequence[Group]) -> Prediction:
    evidence = [found for group in groups for found in one.check(group) if found.n]
    verdicts = {found.verdict for found in evidence}
    if not verdicts:
        verdict = NOT_TESTED
    elif CONTRADICTED in verdicts:
        verdict = CONTRADICTED
    else:
        verdict = SUPPORTED if verdicts == {SUPPORTED} else UNDECIDED
    rule = " ".join((inspect.getdoc(one.check) or "").split())
    needed = [e.pairs_needed for e in evidence if e.verdict == UNDECIDED and e.pairs_needed]
    pairs = max(needed) if needed and verdict == UNDECIDED else None
    before = came_before(one, groups)
    return Prediction(one.name, one.statement, rule, one.needs, verdict, evidence, pairs, before)


def _indirect(group: Group) -> list[Evidence]:
    """Arms: with one map after the experts, and those that differ from them only in having none
    or one for each expert. Measure: how far the change of the shared map alone moves the down
    projections of experts that were not chosen, over the movement of chosen ones; mean over layers
    and windows that have such experts. Supported: above 0 in every run with a shared map and
    exactly 0 in every other. Contradicted: not so in one run. Without a shared map it is 0 by its
    definition: that half checks the records."""
    found = []
    for mapped in arms_with(group, {"moe.expert_out_map.kind": "linear"}):
        others = [
            arm_like(group, mapped, {"moe.expert_out_map.kind": m}) for m in ("none", "separate")
        ]
        for arm in (mapped, *others):
            if arm is None or all(other is None for other in others):
                continue
            numbers = by_seed(arm, lambda r: mean_of_banks(r, "experts.down", "indirect_movement"))
            right = [(x > 0) if arm is mapped else (x == 0) for x in numbers.values()]
            text = f"indirect movement of idle experts, {arm.label}"
            one = evidence_of(group, text, "bank/experts.down/indirect_movement", [arm], numbers)
            found.append(replace(one, p=None, verdict=SUPPORTED if all(right) else CONTRADICTED))
    return found


def _small_change(group: Group) -> list[Evidence]:
    """Arms: one map after the experts with a load-balance loss, against the same without the map.
    Measure: change of held-out MaxVio. Supported: the mean and its 95 % interval lie within 0.1 of
    0. Contradicted: the interval lies wholly outside."""
    found = []
    for mapped in arms_with(
        group, {"moe.expert_out_map.kind": "linear", "moe.balance.kind": "aux"}
    ):
        plain = arm_like(group, mapped, {"moe.expert_out_map.kind": "none"})
        if plain is not None:
            one = difference(group, mapped, plain, MAX_VIO, margin=SMALL_MAX_VIO)
            found.append(decided_within(one))
    return found


def _narrow_router(group: Group) -> list[Evidence]:
    """Arms: a router Q W with frozen Q of width m, four times m at most the number of experts, no
    balance method, against the plain router. Measures: MaxVio of training over the first quarter of
    the steps, and held-out bits per byte. Supported: MaxVio is lower and the error higher, each
    with p < 0.05. Contradicted: one of them is the other way with p < 0.05."""
    found = []
    for mapped in arms_with(group, WITH_ROUTER_MAP):
        config = config_of(mapped)
        width, experts = config.get("moe.router.map.base_width"), config.get("moe.experts")
        plain = arm_like(group, mapped, NO_ROUTER_MAP)
        if plain is None or not width or not experts or 4 * width > experts:
            continue
        started = [
            by_seed(arm, lambda r: early(r, "moe/mean/max_vio", EARLY)) for arm in (mapped, plain)
        ]
        text = f"early MaxVio of training, {mapped.label} minus {plain.label}"
        numbers = {s: x - started[1][s] for s, x in started[0].items() if s in started[1]}
        found.append(
            decided_by_sign(evidence_of(group, text, MAX_VIO, [mapped, plain], numbers), -1)
        )
        found.append(decided_by_sign(difference(group, mapped, plain, ERROR), 1))
    return found


def _centring(group: Group) -> list[Evidence]:
    """Arms: a router Q W with frozen Q, the plain router, and the plain router with centred input.
    Measure: gain in held-out entropy over the plain router. Supported: Q W gains (p < 0.05), and
    the gain of centring less half of Q W's gain is above 0 (p < 0.05). Contradicted: Q W gains, and
    that number is below 0 (p < 0.05). Without a gain of Q W there is nothing to explain:
    undecided."""
    found = []
    for mapped in arms_with(group, WITH_ROUTER_MAP):
        plain = arm_like(group, mapped, NO_ROUTER_MAP)
        centred = plain and arm_like(group, plain, {"moe.router.centre": True})
        if plain is None or centred is None:
            continue
        gain = decided_by_sign(difference(group, mapped, plain, ENTROPY), 1)
        runs = [by_seed(arm, lambda r: value(r, ENTROPY)) for arm in (mapped, plain, centred)]
        shared = [seed for seed in runs[0] if seed in runs[1] and seed in runs[2]]
        numbers = {s: runs[2][s] - runs[1][s] - (runs[0][s] - runs[1][s]) / 2 for s in shared}
        text = f"entropy gained by {centred.label}, less half of what {mapped.label} gains"
        rest = decided_by_sign(
            evidence_of(group, text, ENTROPY, [mapped, plain, centred], numbers), 1
        )
        if gain.verdict != SUPPORTED:
            gain, rest = replace(gain, verdict=UNDECIDED), replace(rest, verdict=UNDECIDED)
        found += [gain, rest]
    return found


def _equivalence(group: Group) -> list[Evidence]:
    """Arms: one map for all after the experts against one for each, both with a load-balance loss
    of weight 0.01. Measure: difference of held-out bits per byte. Supported: two one-sided t tests
    claim it within 0.005 (p < 0.05). Contradicted: its 95 % interval lies wholly outside."""
    found = []
    wanted = {
        "moe.expert_out_map.kind": "linear",
        "moe.balance.kind": "aux",
        "moe.balance.weight": 0.01,
    }
    for mapped in arms_with(group, wanted):
        separate = arm_like(group, mapped, {"moe.expert_out_map.kind": "separate"})
        if separate is None:
            continue
        one = decided_within(difference(group, mapped, separate, ERROR, margin=SMALL_ERROR))
        if one.n >= stats.LEAST_PAIRS and one.verdict != CONTRADICTED:
            claimed = (one.p_equivalent or 0) < stats.LEVEL
            one = (
                replace(one, verdict=SUPPORTED, pairs_needed=None)
                if claimed
                else with_power(one, stats.LEVEL)
            )
        found.append(one)
    return found


def _dead_codes(group: Group) -> list[Evidence]:
    """Arms: SimVQ (linear W, frozen rows, no bias) against VQ with as many codes. Measure: the
    share of codes never drawn on the held-out set, less half of VQ's share. Supported: below 0
    (p < 0.05), so that W takes away more than half of the dead codes. Contradicted: above 0
    (p < 0.05)."""
    found = []
    for simvq, vq in _simvq_and_vq(group):
        runs = [by_seed(arm, lambda r: value(r, "val/codes/dead")) for arm in (simvq, vq)]
        numbers = {s: x - runs[1][s] / 2 for s, x in runs[0].items() if s in runs[1]}
        text = f"dead codes of {simvq.label}, less half of those of {vq.label}"
        found.append(
            decided_by_sign(evidence_of(group, text, "val/codes/dead", [simvq, vq], numbers), -1)
        )
    return found


def _dead_codes_of_bias(group: Group) -> list[Evidence]:
    """Arms: SimVQ, VQ, and frozen rows with a learned bias but no W. Measure: the fall of the share
    of dead codes by the bias alone, less half of the fall by W. Supported: above 0 (p < 0.05).
    Otherwise undecided, for runs do not record whether the encoder's mean drifts."""
    found = []
    for simvq, vq in _simvq_and_vq(group):
        bias = arm_like(group, simvq, {"quantizer.transform": "none", "quantizer.bias": True})
        if bias is None:
            continue
        runs = [by_seed(arm, lambda r: value(r, "val/codes/dead")) for arm in (simvq, vq, bias)]
        shared = [seed for seed in runs[0] if seed in runs[1] and seed in runs[2]]
        numbers = {s: runs[1][s] - runs[2][s] - (runs[1][s] - runs[0][s]) / 2 for s in shared}
        text = f"fall of dead codes by {bias.label}, less half of the fall by {simvq.label}"
        arms = [simvq, vq, bias]
        one = decided_by_sign(evidence_of(group, text, "val/codes/dead", arms, numbers), 1)
        found.append(replace(one, verdict=SUPPORTED if one.verdict == SUPPORTED else UNDECIDED))
    return found


def _self_selecting(group: Group) -> list[Evidence]:
    """Arms: self-selecting experts with one map before them, not started from data and without a
    balance method, against the same without the map. Measure: change of held-out entropy.
    Supported: below 0 (p < 0.05) in every such pair. Contradicted: above 0 (p < 0.05) in one."""
    wanted = {"moe.router.kind": "self_selecting", "moe.expert_in_map.kind": "linear"}
    wanted |= {"moe.router.init": "default", "moe.balance.kind": "none"}
    return [
        decided_by_sign(difference(group, mapped, plain, ENTROPY), -1)
        for mapped in arms_with(group, wanted)
        if (plain := arm_like(group, mapped, {"moe.expert_in_map.kind": "none"})) is not None
    ]


def _pulled_to_data(group: Group) -> list[Evidence]:
    """Arms: self-selecting experts with one map before them that starts from data, against the same
    without a map and without such a start. Measure: change of held-out entropy. Supported: above 0
    (p < 0.05). Contradicted: below 0 (p < 0.05)."""
    wanted = {"moe.router.kind": "self_selecting", "moe.expert_in_map.kind": "linear"}
    wanted |= {"moe.router.init": "data", "moe.balance.kind": "none"}
    plain_keys = {"moe.expert_in_map.kind": "none", "moe.router.init": "default"}
    return [
        decided_by_sign(difference(group, mapped, plain, ENTROPY), 1)
        for mapped in arms_with(group, wanted)
        if (plain := arm_like(group, mapped, plain_keys)) is not None
    ]


FIRST = (
    Registered(
        "P1",
        "A shared map after the experts moves idle experts; without a map, or with one for each "
        "expert, they stay.",
        "a shared map after the experts, and the same arm without a map or with one for each",
        _indirect,
    ),
    Registered(
        "P2",
        "With a load-balance loss, a shared map after the experts changes MaxVio by less than 0.1.",
        "a load-balance loss with and without a shared map after the experts",
        _small_change,
    ),
    Registered(
        "P3",
        "A router Q W that is much narrower than the number of experts lowers early MaxVio without "
        "a balance loss, at a higher error.",
        "a router Q W with frozen, narrow Q, and the plain router",
        _narrow_router,
    ),
    Registered(
        "P4",
        "Centring the router's input explains most of what a router Q W gains in balance.",
        "a router Q W with frozen Q, the plain router, and the plain one with centred input",
        _centring,
    ),
    Registered(
        "P5",
        "With a load-balance loss of 0.01, one map for all experts and one for each are equivalent "
        "within 0.005 bits per byte.",
        "one map for all after the experts and one for each, both with a load-balance loss of 0.01",
        _equivalence,
    ),
    Registered(
        "P6",
        "Dead codes fall steeply with a shared map.",
        "SimVQ with a linear W and frozen rows, and VQ",
        _dead_codes,
    ),
    Registered(
        "P6, bias",
        "They fall mostly with the bias alone, if the encoder's mean drifts.",
        "SimVQ, VQ, and frozen rows with a bias but no W",
        _dead_codes_of_bias,
    ),
    Registered(
        "P7",
        "Where experts choose their tokens, a shared map lowers their evenness.",
        "self-selecting experts with and without a shared map before them",
        _self_selecting,
    ),
    Registered(
        "P7, data",
        "A pull to the data reverses that.",
        "self-selecting experts with a shared map from data, and without a map",
        _pulled_to_data,
    ),
)


REGISTERED = (*FIRST, *SECOND, *OF_KEYS)
"""Predictions of both studies, in the order in which they were written down."""


def _simvq_and_vq(group: Group) -> Iterator[tuple[Arm, Arm]]:
    wanted = {"quantizer.kind": "simvq", "quantizer.transform": "linear"}
    wanted |= {"quantizer.train_base": False, "quantizer.bias": False, "quantizer.init": "default"}
    for simvq in arms_with(group, wanted):
        vq = arm_like(group, simvq, {"quantizer.kind": "vq"})
        if vq is not None:
            yield simvq, vq
