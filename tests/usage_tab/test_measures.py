"""Measures over windows are those of one window, and spells those that a loop finds."""

from __future__ import annotations

import numpy as np
import pytest

from simvq_moe.core.usage import null_usage, usage
from simvq_moe.records.dead_slots import DeadSlots, ranges
from simvq_moe.usage_tab.measures import (
    MOST_SPELLS,
    NAMES_SHOWN,
    chance,
    over_windows,
    plain,
    spells,
    thinned,
)


@pytest.mark.parametrize("slots", [1, 2, 7, 300])
def test_measures_of_windows_are_those_of_each_window(slots: int) -> None:
    rng = np.random.default_rng(slots)
    counts = rng.poisson(rng.gamma(0.3, 8.0, (20, slots))) + (np.arange(slots) == 0)
    found = over_windows(counts)
    for i, n in enumerate(counts):
        one = usage(n)
        for name in ("used", "dead", "entropy", "max_vio"):
            assert found[name][i] == pytest.approx(getattr(one, name), abs=1e-12)
        assert found["starved"][i] == pytest.approx(one.starved - one.dead)


def test_a_window_without_draws_has_no_measures() -> None:
    found = over_windows(np.array([[0, 0], [1, 3]]))
    assert all(np.isnan(values[0]) and np.isfinite(values[1]) for values in found.values())
    assert plain(found["used"]) == [None, 1.0]


def test_dead_and_starved_slots_have_the_last_step_at_which_they_were_not() -> None:
    steps = np.array([10, 20, 30])
    counts = np.array([[100, 90, 80, 0, 3], [100, 90, 0, 0, 90], [100, 90, 0, 0, 3]])
    found = spells(steps, counts)
    assert [(row["since"], row["slots"], row["number"]) for row in found["dead"]] == [
        (None, ["3"], 1),
        (10, ["2"], 1),
    ]
    assert [(row["since"], row["slots"]) for row in found["starved"]] == [(20, ["4"])]


def test_dead_slots_are_those_of_the_table_of_the_run_log() -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.1, 2.0, (30, 50)))
    steps = np.arange(1, 31) * 7
    dead = DeadSlots(1)
    for step, n in zip(steps, counts, strict=True):
        dead.add(int(step), [n])
    rows = [line.split(" | ") for line in dead.table(["moe/00"], 210).splitlines()[2:]]
    told = [(row[2], row[3].removesuffix(" |")) for row in rows]
    found = [
        ("always" if row["since"] is None else str(210 - row["since"]), ", ".join(row["slots"]))
        for row in spells(steps, counts)["dead"]
    ]
    assert found == told


def test_lists_of_slots_are_bounded_and_say_how_many_they_leave_out() -> None:
    counts = np.zeros((60, 4_000), dtype=np.int64)
    counts[:, 1::2] = 1
    (row,) = spells(np.arange(60), counts)["dead"]
    assert (row["number"], len(row["slots"]), row["more"]) == (2_000, NAMES_SHOWN, 1_940)
    each_at_its_own = np.tril(np.ones((60, 60), dtype=np.int64))[::-1]
    assert len(spells(np.arange(60), each_at_its_own)["dead"]) == MOST_SPELLS
    assert ranges(np.array([0, 2])) == ["0", "2"]


def test_points_are_spread_from_the_first_to_the_last() -> None:
    assert thinned(5, 10).tolist() == [0, 1, 2, 3, 4]
    found = thinned(1_000, 60)
    assert (found[0], found[-1], len(found)) == (0, 999, 60)
    assert thinned(1, 60).tolist() == [0]


def test_chance_is_the_null_of_as_many_draws() -> None:
    assert chance(16, 100)["max_vio"] == null_usage(16, 100).max_vio
