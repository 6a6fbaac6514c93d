"""The drift of latents is that of the encoder by one step, in units of their spread."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.engine.world import World
from simvq_moe.tasks.registry import build_task
from simvq_moe.training.latent_drift import LatentDrift, drift
from tests.short_training import train_two_steps


def test_a_shift_is_measured_in_units_of_the_spread_and_a_turn_about_the_mean_is_none() -> None:
    torch.manual_seed(0)
    z = torch.randn(40_000, 4).double() * 3 + 7
    # the spread is the root of the summed variances, 6 here
    assert float(drift(z, z + torch.tensor([0.0, 3.0, 0.0, 0.0]))) == pytest.approx(0.5, rel=0.02)
    mean = z.mean(0)
    assert float(drift(z, mean + 2 * (mean - z))) == pytest.approx(0, abs=1e-12)
    assert float(drift(z + 100, z + 100)) == 0


def test_only_what_moves_the_encoder_drifts(tmp_path: Path) -> None:
    flags = ("--quantizer.codes", "16", "--data.cache_dir", str(tmp_path / "cache"))
    task = build_task(with_flags(Config(), flags, "train"))
    followed = LatentDrift(task, torch.device("cpu"))
    assert followed.measure() == {}
    for name, value in (("to_latent.bias", 0.25), ("from_latent.bias", 0.25)):
        followed.mark()
        with torch.no_grad():
            before = task.model.latents(followed.samples).flatten(0, -2).double()
            task.model.get_parameter(name).add_(value)
        found = followed.measure()["train/latent_drift"]
        spread = before.var(0, correction=0).sum().sqrt()
        moved = 0.25 * before.shape[1] ** 0.5 if name.startswith("to") else 0.0
        assert found == pytest.approx(moved / float(spread), rel=1e-4)


def test_it_stands_in_the_log_of_tokenizers_alone(tmp_path: Path, world: World) -> None:
    for i, flags in enumerate((("--quantizer.codes", "32"), ("--task", "language_model"))):
        runs = tmp_path / str(i)
        train_two_steps(with_flags(Config(), flags, "train"), runs, world)
        lines = (runs / "run" / "metrics.jsonl").read_text().splitlines()
        logged = [json.loads(line).get("train/latent_drift") for line in lines]
        assert all(one is None for one in logged) if i else all(one > 0 for one in logged)
