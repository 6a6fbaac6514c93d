"""Predictions of the second study about keys that are a codebook: rows of a distance router that
learn by the codebook loss alone, without a gradient of the language model and a commitment loss.

Rules go by Student's t interval at 95 %. The case with a drift of the input's mean has no rule.
"""

from __future__ import annotations

from typing import Any

from simvq_moe.analysis.arms import Group
from simvq_moe.analysis.evidence import arm_like, arms_with, by_seed, difference, evidence_of
from simvq_moe.analysis.outcomes import value
from simvq_moe.analysis.predictions_second import ENTROPY, above, below
from simvq_moe.analysis.registered import Registered
from simvq_moe.analysis.results import Evidence

EVEN = 0.9
"""Entropy from which on a use is even."""
NO_HELP = 0.02
"""Gain in entropy that counts as none, as for maps in the first study."""
KEYS: dict[str, Any] = {
    "moe.router.kind": "distance",
    "moe.router.learns_from": "codebook",
    "moe.router.commitment_weight": 0.0,
    "moe.balance.kind": "none",
}
ROWS: dict[str, Any] = {"moe.router.map.kind": "none", "moe.router.init": "default"}


def _even_without_a_map(group: Group) -> list[Evidence]:
    """Arms: distance routers whose rows learn by the codebook loss alone, without a commitment
    loss, a map and a balance method. Measure: held-out entropy. Supported: the interval of its mean
    lies above 0.9. Contradicted: it lies below."""
    found = []
    for arm in arms_with(group, KEYS | ROWS):
        numbers = by_seed(arm, lambda run: value(run, ENTROPY))
        text = f"entropy, {arm.label}"
        found.append(above(evidence_of(group, text, ENTROPY, [arm], numbers), EVEN))
    return found


def _no_help_by_a_map(group: Group) -> list[Evidence]:
    """Arms: such routers with one linear map of all rows, started from data or not, against the
    same without the map. Measure: held-out entropy, the difference. Supported: its interval lies
    below 0.02. Contradicted: it lies above 0.02."""
    found = []
    for arm in arms_with(group, KEYS | {"moe.router.map.kind": "linear"}):
        plain = arm_like(group, arm, ROWS | {"moe.router.map.train_base": True})
        if plain is not None:
            found.append(below(difference(group, arm, plain, ENTROPY), NO_HELP))
    return found


OF_KEYS = (
    Registered(
        "P13, even",
        "Keys that learn by the codebook loss alone are used evenly without a map.",
        "a distance router that learns from the codebook loss, without commitment and map",
        _even_without_a_map,
    ),
    Registered(
        "P13, map",
        "A shared map does not even out such keys further, where the input's mean does not drift.",
        "distance routers that learn from the codebook loss, with and without a linear map",
        _no_help_by_a_map,
    ),
)
