"""Statistics over paired seeds: n runs an arm are n observations, however many tokens they saw.

Seeds pair because the runs of one seed share initial weights and data order. With so few of them
a test assumes nothing about their distribution: exact permutation (sign-flip) tests with Holm's
step-down adjustment (1979). Intervals are Student's t, because a bootstrap of so few differences is
too narrow: BCa of six covers the mean in 87 % of simulations instead of 95 %. Two one-sided t tests
(Schuirmann, 1987) are there where "no difference" is to be claimed rather than not refuted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05
CONFIDENCE = 0.95
LEAST_PAIRS = 6
"""Fewer pairs can't reach p < 0.05: five give 2 / 2^5 = 0.0625 at best."""
LEAST_PAIRS_INTERVAL = 3
POWER = 0.8
"""Share of the studies that are to decide, where pairs are counted beforehand."""
MOST_PAIRS = 100_000
EXACT_PAIRS = 14
"""Up to here all 2^n sign flips are visited; beyond, as many random ones."""


@dataclass(frozen=True)
class Comparison:
    """Differences of paired seeds, arm minus baseline."""

    n: int
    """Pairs."""
    mean: float
    sd: float
    """Sample standard deviation of the differences (ddof 1); nan for one pair."""
    interval: tuple[float, float] | None
    """Student's t interval of the mean at 95 %; None: n too small, or all differences equal."""
    p: float | None
    """Two-sided paired permutation p; None without a pair."""
    p_min: float | None
    """The smallest p that n pairs can give at all."""
    p_equivalent: float | None
    """p of `tost`; None without a margin, or n too small."""


def compare(differences: Sequence[float], margin: float | None = None) -> Comparison:
    """What the paired differences say about their mean.

    Args:
        differences: one a pair; what is not finite is left out.
        margin: largest difference that counts as none.
    """
    d = [x for x in differences if math.isfinite(x)]
    mean, sd = mean_sd(d)
    return Comparison(
        n=len(d),
        mean=mean,
        sd=sd,
        interval=t_interval(d),
        p=permutation_p(d),
        p_min=smallest_p(len(d)),
        p_equivalent=tost(d, margin) if margin and len(d) >= LEAST_PAIRS_INTERVAL else None,
    )


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (ddof 1) of the finite values; nan where undefined."""
    x = np.array([v for v in values if math.isfinite(v)], dtype=float)
    mean = float(x.mean()) if len(x) else math.nan
    return mean, float(x.std(ddof=1)) if len(x) > 1 else math.nan


def smallest_p(n: int) -> float | None:
    """The two-sided p of n differences of one sign: 2 of the 2^n sign flips are as extreme."""
    return min(1.0, 2.0 / 2**n) if n else None


def pairs_needed(tests: int, level: float = 0.05) -> int:
    """The fewest pairs with which the smallest of `tests` p values can pass Holm at `level`."""
    n = 1
    while 2.0 / 2**n * tests >= level:
        n += 1
    return n


def pairs_for_margin(sd: float, margin: float, level: float) -> int | None:
    """The fewest pairs with which arms that do not differ are found within the margin.

    Args:
        sd: standard deviation of the paired differences.
        margin: largest difference that counts as none.
        level: of each of the two one-sided t tests (Schuirmann, 1987).

    Returns:
        The pairs that reach a power of `POWER`, at least `LEAST_PAIRS`; None: more than
        `MOST_PAIRS`.
    """

    def power(n: int) -> float:
        reach = margin * math.sqrt(n) / sd - stats.t.ppf(1 - level, n - 1)
        return 2 * float(stats.t.cdf(reach, n - 1)) - 1

    if not sd > 0:
        return LEAST_PAIRS
    low, high = LEAST_PAIRS, LEAST_PAIRS
    while power(high) < POWER:
        low, high = high, 2 * high
        if high > MOST_PAIRS:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle + 1, high)
    return high


def permutation_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of the mean under random signs; exact up to `EXACT_PAIRS` pairs."""
    if len(differences) < 2:
        # one difference and its mirror image are all there is; scipy refuses so few
        return 1.0 if len(differences) else None
    return float(permutation_ps(np.asarray(differences, dtype=float)))


def permutation_ps(differences: np.ndarray) -> np.ndarray:
    """`permutation_p` of many tests at once, [..., pair] -> [...]; at least two pairs."""
    pairs = differences.shape[-1]
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=2 ** min(pairs, EXACT_PAIRS),
        axis=-1,
        rng=np.random.default_rng(0),
    )
    return np.asarray(test.pvalue)


def t_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Student's t interval of the mean (1908)."""
    d = np.asarray(differences, dtype=float)
    if len(d) < LEAST_PAIRS_INTERVAL or np.ptp(d) <= 1e-12 * np.abs(d).max():
        return None
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    return float(d.mean() - reach), float(d.mean() + reach)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p of a family of tests, in the given order; None stays None, untested."""
    tested = [i for i, p in enumerate(p_values) if p is not None]
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(tested, key=lambda i: p_values[i] or 0.0)):
        # a later p is never below an earlier one: the procedure stops at the first failure
        largest = max(largest, min(1.0, (len(tested) - rank) * (p_values[i] or 0.0)))
        adjusted[i] = largest
    return adjusted


def tost(differences: Sequence[float], margin: float) -> float:
    """p of "the mean difference is at least `margin` either way": small claims equivalence.

    Two one-sided paired t tests; the larger p of the two. The margin is to be fixed before the
    runs, in the units of the differences.

    Raises:
        ValueError: fewer than two pairs, or a margin that is not positive.
    """
    d = np.asarray(differences, dtype=float)
    if len(d) < 2 or not margin > 0:
        raise ValueError(f"tost: needs 2 pairs and a margin > 0, not {len(d)} and {margin}")
    if np.ptp(d) == 0:
        return 0.0 if abs(d[0]) < margin else 1.0
    error = d.std(ddof=1) / math.sqrt(len(d))
    above = stats.t.sf((d.mean() + margin) / error, len(d) - 1)
    below = stats.t.cdf((d.mean() - margin) / error, len(d) - 1)
    return float(max(above, below))
