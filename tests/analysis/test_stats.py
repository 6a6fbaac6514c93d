"""Statistics against scipy, against hand-computed cases and at the edges of few seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as reference

from simvq_moe.analysis import stats


def test_permutation_p_counts_the_sign_flips_that_are_as_extreme():
    # means of (+-1 +-2 +-3) / 3: 6 is the largest sum, and only -6 is as far from 0
    assert stats.permutation_p([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    # 1 - 2 + 3 = 2: sums of 8 flips are +-6, +-4, +-2, 0, 0; six are as far from 0
    assert stats.permutation_p([1.0, -2.0, 3.0]) == pytest.approx(6 / 8)


def test_permutation_p_equals_brute_force_over_all_signs():
    d = np.random.default_rng(0).normal(0.4, 1, 9)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 9)).reshape(9, -1)
    means = (signs * d[:, None]).mean(0)
    brute = float((np.abs(means) >= abs(d.mean()) - 1e-12).mean())
    assert stats.permutation_p(d.tolist()) == pytest.approx(brute)


@pytest.mark.parametrize("n", range(1, 9))
def test_differences_of_one_sign_reach_the_smallest_p_and_no_less(n: int):
    differences = [0.1 + 0.01 * i for i in range(n)]
    assert stats.permutation_p(differences) == pytest.approx(stats.smallest_p(n))


def test_five_pairs_cannot_reach_five_percent_and_six_can():
    five, six = stats.smallest_p(stats.LEAST_PAIRS - 1), stats.smallest_p(stats.LEAST_PAIRS)
    assert five == 0.0625
    assert six == 0.03125


def test_pairs_needed_is_the_fewest_that_can_pass_holm():
    assert stats.pairs_needed(1) == 6
    assert stats.pairs_needed(8) == 9
    for tests in (1, 3, 8, 20):
        n = stats.pairs_needed(tests)
        assert 2 / 2**n * tests < 0.05 <= 2 / 2 ** (n - 1) * tests


def test_no_pair_has_no_p_and_one_pair_says_nothing():
    assert stats.smallest_p(0) is None
    assert stats.permutation_p([]) is None
    assert stats.permutation_p([0.3]) == 1.0


def test_no_difference_at_all_has_p_one():
    assert stats.permutation_p([0.0] * 6) == 1.0


def test_beyond_the_exact_range_p_is_close_to_the_normal_one():
    d = np.random.default_rng(1).normal(0.3, 1, 40)
    p = stats.permutation_p(d.tolist())
    assert p == pytest.approx(reference.ttest_1samp(d, 0)[1], abs=0.02)


def test_the_interval_is_scipys_of_student():
    d = np.random.default_rng(2).gamma(2, 1, 8)
    expected = reference.ttest_1samp(d, 0).confidence_interval(0.95)
    assert stats.t_interval(d.tolist()) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("pairs", [3, 6, 12])
def test_the_interval_covers_the_mean_as_often_as_it_says(pairs: int):
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(2_000):
        interval = stats.t_interval(rng.normal(1.0, 1.0, pairs).tolist())
        assert interval is not None
        covered += interval[0] <= 1.0 <= interval[1]
    assert covered / 2_000 == pytest.approx(0.95, abs=0.015)  # 3 standard errors


@pytest.mark.parametrize("differences", [[], [1.0], [1.0, 2.0], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]])
def test_no_interval_from_too_few_or_equal_differences(differences: list[float]):
    assert stats.t_interval(differences) is None


def test_holm_on_its_textbook_case():
    # sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, and never below the one before
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_leaves_the_untested_out_of_the_family():
    adjusted = stats.holm([None, 0.02, None, 0.5])
    assert adjusted[0] is None
    assert adjusted[2] is None
    assert adjusted[1] == pytest.approx(0.04)
    assert adjusted[3] == pytest.approx(0.5)


def test_holm_never_exceeds_one_nor_falls_below_the_raw_p():
    p = np.random.default_rng(4).uniform(0, 1, 20).tolist()
    for raw, adjusted in zip(p, stats.holm(p), strict=True):
        assert adjusted is not None
        assert raw <= adjusted <= 1


def test_holm_rejects_at_least_what_bonferroni_does():
    p = [0.001, 0.004, 0.012, 0.2, 0.9]
    for raw, adjusted in zip(p, stats.holm(p), strict=True):
        assert adjusted is not None
        assert adjusted <= min(1, raw * len(p)) + 1e-15


def test_tost_is_the_larger_of_two_one_sided_t_tests():
    d = np.random.default_rng(5).normal(0.001, 0.002, 8)
    tests = [
        reference.ttest_1samp(d, bound, alternative=alternative)[1]
        for bound, alternative in ((-0.005, "greater"), (0.005, "less"))
    ]
    assert stats.tost(d.tolist(), 0.005) == pytest.approx(np.max(tests))


def test_tost_claims_equivalence_only_inside_the_margin():
    assert stats.tost([0.001, -0.001, 0.0005, -0.0005, 0.0002, 0.0], 0.005) < 0.05
    assert stats.tost([0.011, 0.009, 0.010, 0.012, 0.008, 0.010], 0.005) > 0.95
    assert stats.tost([0.0, 0.0], 0.005) == 0.0
    assert stats.tost([0.1, 0.1], 0.005) == 1.0


@pytest.mark.parametrize(("differences", "margin"), [([0.1], 0.1), ([0.1, 0.2], 0.0)])
def test_tost_refuses_what_it_cannot_judge(differences: list[float], margin: float):
    with pytest.raises(ValueError, match="tost"):
        stats.tost(differences, margin)


def test_mean_and_sd_of_few_values():
    assert stats.mean_sd([1.0, 2.0, 3.0]) == (2.0, 1.0)
    mean, sd = stats.mean_sd([5.0])
    assert mean == 5.0
    assert math.isnan(sd)
    assert all(math.isnan(x) for x in stats.mean_sd([]))


def test_compare_leaves_out_what_is_not_finite():
    found = stats.compare([0.1, math.nan, 0.3])
    assert found.n == 2
    assert found.mean == pytest.approx(0.2)
    assert found.interval is None


@pytest.mark.parametrize(("sd", "level"), [(0.008, 0.05), (0.004, 0.025)])
def test_pairs_for_a_margin_have_the_power_that_is_said(sd: float, level: float):
    margin = 0.005
    n = stats.pairs_for_margin(sd, margin, level)
    assert n is not None

    def power(pairs: int) -> float:
        d = np.random.default_rng(0).normal(0, sd, (1000, pairs))
        return float(np.mean([stats.tost(row, margin) < level for row in d.tolist()]))

    # 0.038 is three standard errors of 1,000 trials
    assert power(n) > stats.POWER - 0.038
    assert power(n - 2) < stats.POWER + 0.038


def test_pairs_for_a_margin_are_at_least_those_that_decide_anything_and_may_be_too_many():
    assert stats.pairs_for_margin(1e-6, 0.005, 0.05) == stats.LEAST_PAIRS
    assert stats.pairs_for_margin(0.0, 0.005, 0.05) == stats.LEAST_PAIRS
    assert stats.pairs_for_margin(10.0, 0.005, 0.05) is None
