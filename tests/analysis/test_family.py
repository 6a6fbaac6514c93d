"""Many made-up sweeps at once: how often something is established without and with an effect."""

from __future__ import annotations

import numpy as np
import pytest

from simvq_moe.analysis.stats import LEVEL, holm, permutation_ps

SWEEPS = 200
NOISE, SHARED = 0.02, 0.05
"""Spread over runs, and of what all runs of a seed share."""


def established(effects: np.ndarray, pairs: int, seed: int) -> np.ndarray:
    """[sweep][test]: whether a sweep of these effects against one baseline calls it established.

    All tests share the baseline's runs, as the arms of a sweep do.
    """
    rng = np.random.default_rng(seed)
    of_seed = rng.normal(0, SHARED, (SWEEPS, 1, pairs))
    baseline = of_seed + rng.normal(0, NOISE, (SWEEPS, 1, pairs))
    arms = of_seed + effects[:, None] + rng.normal(0, NOISE, (SWEEPS, len(effects), pairs))
    adjusted = [holm(sweep.tolist()) for sweep in permutation_ps(arms - baseline)]
    return np.array(adjusted, dtype=float) < LEVEL


@pytest.mark.parametrize(("tests", "pairs"), [(1, 6), (4, 8), (8, 9)])
def test_without_an_effect_hardly_a_sweep_establishes_anything(tests: int, pairs: int):
    wrong = established(np.zeros(tests), pairs, seed=tests).any(axis=1).mean()
    # 5 % is the most that is expected of any family; 0.097 is three standard errors above it
    assert wrong <= LEVEL + 3 * (LEVEL * (1 - LEVEL) / SWEEPS) ** 0.5


def test_a_known_effect_is_found_and_the_arms_without_one_are_not():
    found = established(np.array([0.08, 0.0, 0.0, 0.0]), pairs=9, seed=0)
    assert found[:, 0].mean() > 0.95
    assert found[:, 1:].any(axis=1).mean() < 0.1


def test_without_adjustment_more_sweeps_would_be_wrong():
    rng = np.random.default_rng(1)
    d = rng.normal(0, 1, (SWEEPS, 8, 9)) - rng.normal(0, 1, (SWEEPS, 1, 9))
    assert (permutation_ps(d) < LEVEL).any(axis=1).mean() > 0.15
