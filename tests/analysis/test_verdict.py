"""The sentences that answer a question: primary tests first, in the same words whichever way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simvq_moe.analysis.comparison import compute
from simvq_moe.analysis.run_folders import find
from tests.reports.synthetic import FakeArm, write_sweep

VQ, BETTER = FakeArm("vq", "VQ", 3.0e-3, 0.3), FakeArm("better", "better", 2.0e-3, 0.3)
PRIMARY = {"better": "val/mse"}


def with_primary(
    tmp_path: Path, better: FakeArm, seeds: int = 8, noise: float = 0.05
) -> dict[str, Any]:
    arms = (VQ, better, FakeArm("control", "narrow", 2.5e-3, 0.3, control=True))
    write_sweep(tmp_path / "s", seeds=seeds, noise=noise, codes=arms, experts=(), primary=PRIMARY)
    return compute(find([tmp_path / "s"]).groups, tmp_path).as_json()["groups"][0]


def test_a_primary_test_alone_is_adjusted_and_answers_first(tmp_path: Path):
    group = with_primary(tmp_path, BETTER)
    first, *others = group["paired"]
    assert (first["arm"], first["metric"], first["primary"]) == ("better", "val/mse", True)
    assert first["p_holm"] == first["p"] == pytest.approx(2 / 2**8)
    assert not any(pair["primary"] or pair["p_holm"] for pair in others)
    assert group["verdict"][0].startswith("Yes: against VQ, better lowers MSE by 0.00")
    assert "the control narrow" in group["verdict"][1]
    assert all("stablished" not in s for s in [*group["verdict"][1:], *group["secondary"]])
    assert any("lower with the control narrow" in s for s in group["secondary"])


def test_an_effect_for_the_worse_is_answered_as_plainly(tmp_path: Path):
    group = with_primary(tmp_path, FakeArm("better", "better", 4e-3, 0.3))
    start = "No, on the contrary: against VQ, better raises MSE by 0.00"
    assert group["verdict"][0].startswith(start)
    assert any("MSE is worsened by better" in s for s in group["negative"])
    assert any("does not beat: the control narrow" in s for s in group["negative"])


def test_no_effect_of_a_primary_test_is_not_shown(tmp_path: Path):
    group = with_primary(tmp_path, FakeArm("better", "better", 3e-3, 0.3))
    assert group["verdict"][0].startswith("Not shown: against VQ, better changes MSE by")
    assert "95 % interval" in group["verdict"][0]
    assert any("MSE is not shown to be changed by better" in s for s in group["negative"])


def test_too_few_pairs_say_how_many_would_do(tmp_path: Path):
    group = with_primary(tmp_path, BETTER, seeds=5)
    assert group["verdict"][0].startswith("Not shown")
    assert "n = 5 pairs can't reach p < 0.05" in group["verdict"][1]
    assert "6 pairs would" in group["verdict"][1]
    assert group["pairs_needed"] == 6


def test_a_primary_test_without_a_run_is_named(tmp_path: Path):
    write_sweep(tmp_path / "s", codes=(VQ, BETTER), experts=(), primary={"gone": "val/mse"})
    group = compute(find([tmp_path / "s"]).groups, tmp_path).as_json()["groups"][0]
    assert group["verdict"] == ["The primary test of gone on MSE has no pair of finished runs."]
