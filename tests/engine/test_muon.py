"""Routers that Muon steps: the update of its paper, beside AdamW, resumed exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from simvq_moe.config.checks import check
from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.engine.build import make_engine
from simvq_moe.engine.optimizer import parameter_groups
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.tasks.registry import build_model
from tests.launching import ROOT, metrics
from tests.short_training import train_flags

FLAGS = (
    *("--task", "language_model", "--data.vocabulary", "300", "--data.context", "16"),
    *("--language_model.width", "16", "--language_model.layers", "1", "--moe.experts", "8"),
    *("--moe.top_k", "2", "--moe.hidden", "8", "--optimizer.router", "muon"),
    *("--train.zero_stage", "0", "--optimizer.warmup_steps", "0", "--train.batch_size", "4"),
    *("--optimizer.weight_decay", "0.1", "--optimizer.router_lr_multiplier", "2"),
)


def naive(rows: Tensor, gradients: list[Tensor], lr: float, decay: float, beta: float) -> Tensor:
    """Rows after Muon's steps with Nesterov's momentum (Jordan et al., 2024), in float64, with
    singular values that are exactly 1: torch's are between 0.5 and 1.5."""
    momentum = torch.zeros_like(rows)
    for gradient in gradients:
        momentum = beta * momentum + (1 - beta) * gradient
        u, _, v = torch.linalg.svd(beta * momentum + (1 - beta) * gradient, full_matrices=False)
        rows = rows * (1 - lr * decay) - lr * 0.2 * max(rows.shape) ** 0.5 * u @ v
    return rows


def test_rows_take_the_steps_of_muon_and_all_else_those_of_adamw(world: World) -> None:
    config = with_flags(Config(), FLAGS, "train")
    adamw = with_flags(config, ("--optimizer.router", "adamw"), "train")
    ends: list[dict[str, Tensor]] = []
    starts: dict[str, Tensor] = {}
    gradients: list[dict[str, Tensor]] = []
    for one in (config, adamw):
        torch.manual_seed(0)
        model = build_model(one)
        starts = {name: p.detach().clone() for name, p in model.named_parameters()}
        engine: Any = make_engine(model, one, world)
        for step in range(3):
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
            engine.optimizer.step()
        ends.append(dict(model.named_parameters()))
    rows = [name for name in starts if name.endswith("router.bank.base")]
    assert rows
    for name, end in ends[0].items():
        if name not in rows:
            assert torch.equal(end, ends[1][name]), name
    for name in rows:
        shown = [step[name].double() for step in gradients[:3]]
        lr = config.optimizer.lr * 2
        expected = naive(starts[name].double(), shown, lr, 0.1, config.optimizer.betas[0])
        moved, ideal = ends[0][name] - starts[name], expected - starts[name]
        assert_close(moved.norm(), ideal.norm().float(), rtol=0.3, atol=0.0)
        assert torch.cosine_similarity(moved.flatten(), ideal.float().flatten(), dim=0) > 0.95
        length = lr * 0.2 * max(starts[name].shape) ** 0.5
        assert torch.linalg.svdvals(moved).min() / length > 0.5


def test_a_run_goes_on_to_the_bit(world: World, tmp_path: Path) -> None:
    run = (*FLAGS, "--data.source", str(ROOT / "tests" / "moe"), "--train.log_every", "1")
    run = (*run, "--train.clip", "1", "--train.save_every", "2", "--train.probe_tokens", "0")
    whole = train_flags(world, tmp_path / "whole", *run, "--train.steps", "4")
    parts = train_flags(world, tmp_path / "parts", *run, "--train.steps", "2")
    assert train_flags(world, tmp_path / "parts", *run, "--train.steps", "4") == parts
    names = ("step", "train/loss", "train/grad_norm", "val/bits_per_byte")
    one, other = ([[line.get(n) for n in names] for line in metrics(run)] for run in (whole, parts))
    assert one[-1] == other[-1]
    assert [line[:3] for line in one if line[1]] == [line[:3] for line in other if line[1]]
    assert [line[0] for line in one if line[1]] == [1, 2, 3, 4]


def test_what_it_cannot_step_is_one_line() -> None:
    cut = with_flags(Config(), (*FLAGS, "--train.zero_stage", "1"), "train")
    with pytest.raises(ConfigError, match=r"optimizer\.router 'muon' with train.zero_stage 1"):
        check(cut)
    hashed = with_flags(Config(), (*FLAGS, "--moe.router.kind", "hash"), "train")
    with pytest.raises(ConfigError, match="without a matrix that a router learns"):
        parameter_groups(build_model(hashed), hashed.optimizer)
