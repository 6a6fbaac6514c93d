"""Registered predictions on made-up runs: each verdict is reached, and by configs, not by names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simvq_moe.analysis.predictions import REGISTERED, check_all
from simvq_moe.analysis.results import Prediction
from simvq_moe.analysis.run_folders import Arm, Group, RunRecord

PLAIN: dict[str, Any] = {
    "moe.router.kind": "topk",
    "moe.experts": 64,
    "moe.router.map.kind": "none",
    "moe.router.map.train_base": True,
    "moe.router.centre": False,
    "moe.router.whiten.kind": "none",
    "moe.expert_out_map.kind": "none",
    "moe.expert_in_map.kind": "none",
    "moe.balance.kind": "none",
    "quantizer.kind": "vq",
    "quantizer.codes": 512,
    "quantizer.restart": 0.0,
    "quantizer.transform": "linear",
    "quantizer.train_base": False,
    "quantizer.bias": False,
    "quantizer.init": "default",
    "optimizer.lr": 1e-3,
    "optimizer.map_lr_multiplier": 1.0,
    "language_model.depth_scaled": True,
}
AUX = {"moe.balance.kind": "aux", "moe.balance.weight": 0.01}
OUT, SEPARATE = {"moe.expert_out_map.kind": "linear"}, {"moe.expert_out_map.kind": "separate"}
ROUTER = {
    "moe.router.map.kind": "linear",
    "moe.router.map.train_base": False,
    "moe.router.map.base_width": None,
}
NARROW = ROUTER | {"moe.router.map.base_width": 8}
CENTRED = {"moe.router.centre": True}
WHITE, DIAGONAL = (
    {"moe.router.whiten.kind": kind, "moe.router.whiten.exponent": 1.0}
    for kind in ("full", "diagonal")
)
HALF = WHITE | {"moe.router.whiten.exponent": 0.5}
STRONG = AUX | {"moe.balance.weight": 0.03}
FREE = {"moe.balance.kind": "loss_free", "moe.balance.rate": 0.001}
RESTARTED = {
    "quantizer.kind": "ema",
    "quantizer.init": "default",
    "quantizer.restart": 0.1,
}
KEYS = {
    "moe.router.kind": "distance",
    "moe.router.learns_from": "codebook",
    "moe.router.commitment_weight": 0.0,
    "moe.router.init": "default",
}
QW = KEYS | ROUTER
UNSCALED = {"language_model.depth_scaled": False}
EQUAL = UNSCALED | OUT
MANY = {"quantizer.codes": 8192}
SELF = {"moe.router.kind": "self_selecting", "moe.router.init": "default"}
SELF_MAP = SELF | {"moe.expert_in_map.kind": "linear"}
SELF_DATA = SELF_MAP | {"moe.router.init": "data"}
SIMVQ = {"quantizer.kind": "simvq"}
BIAS = SIMVQ | {"quantizer.transform": "none", "quantizer.bias": True}
ENTROPY, MAX_VIO = "val/moe/mean/entropy", "val/moe/mean/max_vio"
ERROR, DEAD = "val/bits_per_byte", "val/codes/dead"
USED, MSE = "val/codes/used", "val/mse"
EARLY, MOVED = "early", "moved"


def arm(
    name: str,
    changes: dict[str, Any],
    numbers: dict[str, float],
    seeds: int = 6,
    spread: float = 0.001,
) -> Arm:
    """Runs with these numbers and a small spread over seeds, another for every arm."""
    rng = np.random.default_rng([*name.encode()])
    runs = []
    for seed in range(seeds):
        final = {k: v + spread * rng.normal() for k, v in numbers.items()}
        early, moved = final.pop(EARLY, 0.0), numbers.get(MOVED)
        lines = [
            {"step": float(s), "moe/mean/max_vio": early if s <= 25 else 99.0} for s in (25, 100)
        ]
        if moved is not None:
            lines[-1] |= {"bank/00/indirect_movement": moved, "bank/01/indirect_movement": 7.0}
        runs.append(
            RunRecord(
                path=Path(name),
                arm=name,
                seed=seed,
                status="finished",
                config=PLAIN | changes | {"seed": seed, "name": f"{name}/{seed}", "arm": name},
                meta={
                    "banks": ["blocks.0.moe.experts.down", "blocks.0.moe.router.bank"],
                    "layers": [{"kind": "experts", "slots": 64, "top_k": 4}] * 2,
                },
                metrics=tuple(lines),
                final=final,
            )
        )
    return Arm(name, f"label of {name}", control=False, runs=tuple(runs))


def checked(name: str, *arms: Arm, tuned: bool = False) -> Prediction:
    numbers = tuple({one.number for one in REGISTERED})
    group = Group("g", "Question?", arms[0].name, (ERROR,), arms, predictions=numbers, tuned=tuned)
    return next(one for one in check_all([group]) if one.name == name)


def of(metric: str, value: float) -> dict[str, float]:
    return {metric: value}


def layered(entropies: list[float], ranks: list[float]) -> dict[str, float]:
    """Entropy and effective rank of the logits of each layer."""
    named = {f"val/moe/{i:02d}/entropy": x for i, x in enumerate(entropies)}
    return named | {f"val/moe/{i:02d}/logits_rank": x for i, x in enumerate(ranks)}


def whitened(entropy: float) -> list[tuple[str, dict[str, Any], dict[str, float]]]:
    return [("a", CENTRED, of(ENTROPY, 0.8)), ("b", WHITE, of(ENTROPY, entropy))]


def errors(white: float, strong: float) -> list[tuple[str, dict[str, Any], dict[str, float]]]:
    """Of the plain router 2.00, and of the better of two balancers `strong`."""
    return [
        ("a", {}, of(ERROR, 2.0)),
        ("b", WHITE, of(ERROR, white)),
        ("c", FREE, of(ERROR, 1.99)),
        ("d", STRONG, of(ERROR, strong)),
    ]


def exponents(half: float, one: float) -> list[tuple[str, dict[str, Any], dict[str, float]]]:
    above = WHITE | {"moe.router.whiten.exponent": 2.0}
    return [
        ("a", WHITE | {"moe.router.whiten.exponent": 0.0}, of(ENTROPY, 0.8)),
        ("b", HALF, of(ENTROPY, half)),
        ("c", WHITE, of(ENTROPY, one)),
        ("d", above, of(ENTROPY, 0.1)),
    ]


CASES = [
    ("P8", "supported", whitened(0.95)),
    ("P8", "undecided", whitened(0.9)),
    ("P8", "contradicted", whitened(0.85)),
    ("P9", "supported", errors(1.95, 1.955)),
    ("P9", "contradicted", errors(1.95, 1.93)),
    ("P9", "contradicted", errors(2.05, 2.06)),
    ("P9", "undecided", errors(1.95, 1.945)),
    ("P10", "supported", exponents(0.85, 0.9)),
    ("P10", "contradicted", exponents(0.85, 0.82)),
    ("P11", "supported", [*whitened(0.95), ("c", DIAGONAL, of(ENTROPY, 0.85))]),
    ("P11", "contradicted", [*whitened(0.95), ("c", DIAGONAL, of(ENTROPY, 0.94))]),
    ("P11", "undecided", [*whitened(0.95), ("c", DIAGONAL, of(ENTROPY, 0.9))]),
    (
        "P12",
        "supported",
        [
            ("a", {}, layered([0.7, 0.75], [10.0, 12.0])),
            ("b", WHITE, layered([0.95, 0.97], [36.0, 39.0])),
        ],
    ),
    (
        "P12",
        "contradicted",
        [
            ("a", {}, layered([0.7, 0.75], [39.0, 36.0])),
            ("b", WHITE, layered([0.95, 0.97], [12.0, 10.0])),
        ],
    ),
    ("P13, even", "supported", [("a", KEYS, of(ENTROPY, 0.95))]),
    ("P13, even", "contradicted", [("a", KEYS, of(ENTROPY, 0.85))]),
    ("P13, map", "supported", [("a", KEYS, of(ENTROPY, 0.95)), ("b", QW, of(ENTROPY, 0.9))]),
    ("P13, map", "contradicted", [("a", KEYS, of(ENTROPY, 0.9)), ("b", QW, of(ENTROPY, 0.95))]),
    ("P13, map", "undecided", [("a", KEYS, of(ENTROPY, 0.9)), ("b", QW, of(ENTROPY, 0.92))]),
    (
        "P14, null",
        "supported",
        [("a", UNSCALED, of(ENTROPY, 0.7)), ("b", EQUAL, of(ENTROPY, 0.71))],
    ),
    (
        *("P14, null", "contradicted"),
        [("a", UNSCALED, of(ENTROPY, 0.7)), ("b", EQUAL, of(ENTROPY, 0.8))],
    ),
    (
        *("P14, null", "undecided"),
        [("a", UNSCALED, of(ENTROPY, 0.7)), ("b", EQUAL, of(ENTROPY, 0.72))],
    ),
    (
        *("P14, sharing", "supported"),
        [("a", UNSCALED | SEPARATE, of(ENTROPY, 0.7)), ("b", EQUAL, of(ENTROPY, 0.75))],
    ),
    (
        *("P14, sharing", "contradicted"),
        [("a", UNSCALED | SEPARATE, of(ENTROPY, 0.8)), ("b", EQUAL, of(ENTROPY, 0.75))],
    ),
    ("P15, use", "supported", [("a", SIMVQ, of(USED, 0.6)), ("b", RESTARTED, of(USED, 0.9))]),
    ("P15, use", "contradicted", [("a", SIMVQ, of(USED, 0.6)), ("b", RESTARTED, of(USED, 0.5))]),
    (
        "P15, error",
        "supported",
        [
            ("a", SIMVQ | MANY | {"quantizer.init": "data"}, of(MSE, 0.1)),
            ("b", RESTARTED | MANY, of(MSE, 0.2)),
        ],
    ),
    (
        "P15, error",
        "contradicted",
        [
            ("a", SIMVQ | MANY | {"quantizer.init": "data"}, of(MSE, 0.2)),
            ("b", RESTARTED | MANY, of(MSE, 0.1)),
        ],
    ),
    (
        "P1",
        "supported",
        [("a", {}, of(MOVED, 0.0)), ("b", OUT, of(MOVED, 0.2)), ("c", SEPARATE, of(MOVED, 0.0))],
    ),
    ("P1", "contradicted", [("a", {}, of(MOVED, 1e-9)), ("b", OUT, of(MOVED, 0.2))]),
    ("P1", "contradicted", [("a", {}, of(MOVED, 0.0)), ("b", OUT, of(MOVED, 0.0))]),
    ("P2", "supported", [("a", AUX, of(MAX_VIO, 1.3)), ("b", AUX | OUT, of(MAX_VIO, 1.35))]),
    ("P2", "contradicted", [("a", AUX, of(MAX_VIO, 1.3)), ("b", AUX | OUT, of(MAX_VIO, 1.5))]),
    ("P2", "undecided", [("a", AUX, of(MAX_VIO, 1.3)), ("b", AUX | OUT, of(MAX_VIO, 1.4))]),
    (
        "P3",
        "supported",
        [("a", {}, {EARLY: 8.0, ERROR: 2.0}), ("b", NARROW, {EARLY: 5.0, ERROR: 2.1})],
    ),
    (
        "P3",
        "contradicted",
        [("a", {}, {EARLY: 8.0, ERROR: 2.0}), ("b", NARROW, {EARLY: 5.0, ERROR: 1.9})],
    ),
    (
        "P3",
        "undecided",
        [("a", {}, {EARLY: 8.0, ERROR: 2.0}), ("b", NARROW, {EARLY: 5.0, ERROR: 2.0})],
    ),
    (
        "P4",
        "supported",
        [
            ("a", {}, of(ENTROPY, 0.7)),
            ("b", ROUTER, of(ENTROPY, 0.8)),
            ("c", CENTRED, of(ENTROPY, 0.78)),
        ],
    ),
    (
        "P4",
        "contradicted",
        [
            ("a", {}, of(ENTROPY, 0.7)),
            ("b", ROUTER, of(ENTROPY, 0.8)),
            ("c", CENTRED, of(ENTROPY, 0.72)),
        ],
    ),
    (
        "P4",
        "undecided",
        [
            ("a", {}, of(ENTROPY, 0.7)),
            ("b", ROUTER, of(ENTROPY, 0.6)),
            ("c", CENTRED, of(ENTROPY, 0.78)),
        ],
    ),
    (
        "P5",
        "supported",
        [("a", AUX | OUT, of(ERROR, 2.0)), ("b", AUX | SEPARATE, of(ERROR, 2.001))],
    ),
    (
        "P5",
        "contradicted",
        [("a", AUX | OUT, of(ERROR, 2.0)), ("b", AUX | SEPARATE, of(ERROR, 2.02))],
    ),
    (
        "P5",
        "undecided",
        [("a", AUX | OUT, of(ERROR, 2.0)), ("b", AUX | SEPARATE, of(ERROR, 2.005))],
    ),
    ("P6", "supported", [("a", {}, of(DEAD, 0.95)), ("b", SIMVQ, of(DEAD, 0.3))]),
    ("P6", "contradicted", [("a", {}, of(DEAD, 0.95)), ("b", SIMVQ, of(DEAD, 0.6))]),
    (
        "P6, bias",
        "supported",
        [("a", {}, of(DEAD, 0.95)), ("b", SIMVQ, of(DEAD, 0.35)), ("c", BIAS, of(DEAD, 0.5))],
    ),
    (
        "P6, bias",
        "undecided",
        [("a", {}, of(DEAD, 0.95)), ("b", SIMVQ, of(DEAD, 0.35)), ("c", BIAS, of(DEAD, 0.9))],
    ),
    ("P7", "supported", [("a", SELF, of(ENTROPY, 0.8)), ("b", SELF_MAP, of(ENTROPY, 0.75))]),
    ("P7", "contradicted", [("a", SELF, of(ENTROPY, 0.8)), ("b", SELF_MAP, of(ENTROPY, 0.85))]),
    ("P7, data", "supported", [("a", SELF, of(ENTROPY, 0.8)), ("b", SELF_DATA, of(ENTROPY, 0.85))]),
    (
        "P7, data",
        "contradicted",
        [("a", SELF, of(ENTROPY, 0.8)), ("b", SELF_DATA, of(ENTROPY, 0.75))],
    ),
]


@pytest.mark.parametrize(
    ("name", "verdict", "arms"), CASES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_known_effects_get_their_verdict(name: str, verdict: str, arms: list[Any]):
    found = checked(name, *(arm(a, changes, numbers) for a, changes, numbers in arms))
    assert found.verdict == verdict
    assert found.evidence


@pytest.mark.parametrize(
    ("name", "arms"),
    [(n, arms) for n, verdict, arms in CASES if verdict == "supported" and n != "P1"],
)
def test_five_pairs_decide_nothing(name: str, arms: list[Any]):
    found = checked(name, *(arm(a, changes, n, seeds=5) for a, changes, n in arms))
    assert found.verdict == "undecided"


SOME_ARMS = ("P1", "P9", "P10")
"""Predictions that any two of their arms can test."""
ONE_ARM = ("P13, even",)
"""Predictions about one arm, without which there is no group."""


@pytest.mark.parametrize(
    ("name", "arms"), {n: arms for n, _, arms in CASES if n not in (*SOME_ARMS, *ONE_ARM)}.items()
)
def test_without_one_of_its_arms_a_prediction_is_not_tested(name: str, arms: list[Any]):
    for left_out in range(len(arms)):
        kept = [arm(a, changes, n) for i, (a, changes, n) in enumerate(arms) if i != left_out]
        found = checked(name, *kept)
        assert found.verdict == "not tested"
        assert found.needs


def test_indirect_movement_needs_a_map_and_either_control():
    plain, mapped = arm("a", {}, of(MOVED, 0.0)), arm("b", OUT, of(MOVED, 0.2))
    separate = arm("c", SEPARATE, of(MOVED, 0.0))
    assert checked("P1", mapped).verdict == "not tested"
    assert checked("P1", plain, separate).verdict == "not tested"
    assert checked("P1", plain, mapped).verdict == "supported"
    assert checked("P1", separate, mapped).verdict == "supported"


def test_whitening_is_held_against_the_plain_router_and_the_best_balancer():
    plain, white, free, strong = (arm(*one) for one in errors(1.95, 1.955))
    assert checked("P9", plain, white).verdict == "not tested"
    assert checked("P9", white, free).verdict == "not tested"
    found = checked("P9", plain, white, free, strong)
    assert [one.arms for one in found.evidence] == [["b", "d"], ["b", "a"]]


def test_the_trend_goes_over_neighbouring_exponents_up_to_1():
    arms = [arm(*one) for one in exponents(0.85, 0.9)]
    found = checked("P10", *arms)
    assert [one.arms for one in found.evidence] == [["b", "a"], ["c", "b"]]
    assert checked("P10", arms[0], arms[3]).verdict == "not tested"


def test_too_few_pairs_for_a_margin_are_said_with_how_many_would_do():
    def equivalence(seeds: int) -> Prediction:
        arms = [
            arm(name, AUX | changes, of(ERROR, 2.0), seeds=seeds, spread=0.006)
            for name, changes in (("a", OUT), ("b", SEPARATE))
        ]
        return checked("P5", *arms)

    few = equivalence(6)
    assert few.verdict == "undecided"
    assert few.pairs_needed is not None
    assert few.pairs_needed > 12
    enough = equivalence(60)
    assert enough.verdict == "supported"
    assert enough.pairs_needed is None
    plain = arm("a", SELF, of(ENTROPY, 0.8), seeds=3)
    mapped = arm("b", SELF_MAP, of(ENTROPY, 0.7), seeds=3)
    assert checked("P7", plain, mapped).pairs_needed == 6


def test_noise_decides_nothing():
    claimed = 0
    for i in range(40):
        arms = [
            arm(f"{i}{name}", changes, of(ENTROPY, 0.8), spread=0.02)
            for name, changes in (("a", SELF), ("b", SELF_MAP))
        ]
        claimed += checked("P7", *arms).verdict != "undecided"
    # 2 of 2^6 sign patterns reach p < 0.05: 1.25 of 40 are expected, 6 or more have p < 0.002
    assert claimed < 6


def test_an_arm_that_differs_in_more_than_the_map_is_no_counterpart():
    plain = arm("a", SELF, of(ENTROPY, 0.8))
    other = arm("b", SELF_MAP | {"optimizer.lr": 1e-2}, of(ENTROPY, 0.7))
    assert checked("P7", plain, other).verdict == "not tested"
    # a grid's choice of learning rates is part of the comparison
    assert checked("P7", plain, other, tuned=True).verdict == "supported"


def test_every_case_counts_and_one_that_fails_contradicts():
    frozen = {"moe.router.map.train_base": False}
    arms = [
        arm("a", SELF, of(ENTROPY, 0.80)),
        arm("b", SELF_MAP, of(ENTROPY, 0.75)),
        arm("c", SELF | frozen, of(ENTROPY, 0.90)),
        arm("d", SELF_MAP | frozen, of(ENTROPY, 0.95)),
    ]
    found = checked("P7", *arms)
    assert [one.verdict for one in found.evidence] == ["supported", "contradicted"]
    assert found.verdict == "contradicted"


def test_the_numbers_are_those_of_the_seeds():
    arms = [
        arm("a", {}, of(ENTROPY, 0.7)),
        arm("b", ROUTER, of(ENTROPY, 0.8)),
        arm("c", CENTRED, of(ENTROPY, 0.78)),
    ]
    plain, mapped, centred = ([run.final[ENTROPY] for run in one.runs] for one in arms)
    gain, rest = checked("P4", *arms).evidence
    assert gain.values == pytest.approx(np.subtract(mapped, plain).tolist())
    expected = np.subtract(centred, plain) - np.subtract(mapped, plain) / 2
    assert rest.values == pytest.approx(expected.tolist())
    assert rest.mean == pytest.approx(expected.mean())


def test_a_failed_run_is_in_no_case():
    plain, mapped = arm("a", SELF, of(ENTROPY, 0.8)), arm("b", SELF_MAP, of(ENTROPY, 0.75))
    runs = (replace(mapped.runs[0], status="failed"), *mapped.runs[1:])
    (case,) = checked("P7", plain, replace(mapped, runs=runs)).evidence
    assert case.seeds == [1, 2, 3, 4, 5]
    assert case.verdict == "undecided"


def test_every_rule_says_when_it_holds():
    for one in REGISTERED:
        rule = one.check.__doc__ or ""
        assert all(word in rule for word in ("Arms:", "Measure", "Supported:")), one.name
        assert "Contradicted:" in rule or "Otherwise undecided" in rule
