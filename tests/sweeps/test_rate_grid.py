"""A learning rate for each arm, chosen on a seed of its own and then kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simvq_moe.errors import ConfigError
from simvq_moe.sweeps.plan import plan
from simvq_moe.sweeps.rate_grid import best, grid_runs, with_rates
from tests.launching import run_here

SWEEP = """
name: rates
title: Rates
seeds: [0]
lr_grid: {seed: 100, factors: [0.01, 1, 1e33]}
set: {train: {steps: 6, batch_size: 8, log_every: 2}, data: {crops: 64, held_out_crops: 18}}
groups:
  codes:
    question: Which rate?
    config: base.yaml
    baseline: vq
    outcomes: [val/mse]
    arms: {vq: {label: VQ, set: {quantizer: {kind: vq}}}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("quantizer: {codes: 16}\noptimizer: {warmup_steps: 0}\n")
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return tmp_path


def test_the_best_factor_wins_a_failed_one_loses_and_without_any_the_rate_stays() -> None:
    assert best({0.3: 0.2, 1.0: 0.1, 3.0: None}, higher=False) == 1
    assert best({0.3: 20.0, 1.0: 10.0, 3.0: None}, higher=True) == 0.3
    assert best({1.0: 0.1, 0.3: 0.1}, higher=False) == 0.3
    assert best({0.3: None, 3.0: None}, higher=False) == 1


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("lr_grid: {seed: 0}", "lr_grid.seed 0 is one of the paired seeds"),
        ("lr_grid: {factors: [1, -1]}", "lr_grid.factors"),
        ("lr_grid: {sede: 0}", "unknown key lr_grid.sede"),
    ],
)
def test_a_bad_grid_is_one_line(folder: Path, extra: str, words: str) -> None:
    (folder / "more.yaml").write_text(extra)
    with pytest.raises(ConfigError, match=words):
        plan([folder / "sweep.yaml", folder / "more.yaml"])


@pytest.mark.distributed
def test_paired_runs_have_the_rate_that_the_grid_chose_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    ran = run_here("sweep", "--config", "sweep.yaml", "--parallel", "2", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    root = folder / "runs" / "rates"
    rates = json.loads((root / "lr_grid.json").read_text())
    assert rates.keys() == {"codes/vq"}
    for arm, rate in rates.items():
        tried = {
            f: json.loads((root / "lr_grid" / arm / f"x{f}" / "summary.json").read_text())[
                "val/mse"
            ]
            for f in ("0.01", "1")
        }
        assert rate["values"] == {**tried, "1e+33": None}
        assert rate["factor"] == float(min(tried, key=lambda f: tried[f]))
        config = (root / arm / "seed0" / "config.yaml").read_text()
        assert f"lr: {1e-3 * rate['factor']}" in config
    arms = json.loads((root / "sweep.json").read_text())["groups"][0]["arms"]
    assert [arm["lr"] for arm in arms] == [rates["codes/vq"]]
    # a second time nothing is tried, though one run has failed
    again = plan([folder / "sweep.yaml"])
    assert grid_runs(again) == []
    assert {r.config.optimizer.lr for r in with_rates(again).runs} == {
        rate["lr"] for rate in rates.values()
    }
    (folder / "more.yaml").write_text("lr_grid: {factors: [0.1, 1]}")
    with pytest.raises(ConfigError, match="chosen on seed 100 of factors"):
        grid_runs(plan([folder / "sweep.yaml", folder / "more.yaml"]))
