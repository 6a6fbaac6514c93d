"""In bfloat16 gradients are added up, over micro-batches and ranks, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.engine.build import make_engine
from simvq_moe.engine.world import World
from simvq_moe.tasks.registry import build_model
from tests.two_ranks import TwoRanks

SAMPLES = 64
SMALL = (
    *("--task", "language_model", "--data.vocabulary", "260", "--data.context", "8"),
    *("--language_model.width", "16", "--language_model.layers", "1", "--moe.experts", "4"),
    *("--moe.top_k", "2", "--moe.hidden", "8", "--optimizer.lr", "0"),
    *("--train.batch_size", str(SAMPLES)),
)


def gradient(world: World, parts: int, *flags: str) -> Tensor:
    """The gradient of one global batch, in so many micro-batches."""
    flags = (*SMALL, "--train.accumulation", str(parts), *flags)
    config = with_flags(Config(), flags, "train")
    model = build_model(config)
    with torch.no_grad():  # weights that both precisions hold exactly
        for p in model.parameters():
            p.copy_(p.bfloat16().float())
    engine: Any = make_engine(model, config, world)
    torch.manual_seed(0)
    tokens = torch.randint(260, (SAMPLES, 9))
    found = []
    for i, part in enumerate(tokens.chunk(parts)):
        loss, _ = engine(part.chunk(world.size)[world.rank])
        engine.backward(loss)
        if i == parts - 1:
            for p in engine.module.parameters():
                g = safe_get_full_grad(p) if p.grad is None else p.grad
                assert g is not None
                found.append(g.float().flatten())
        engine.step()
    return torch.cat(found)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found / found.norm() - exact / exact.norm()).norm())


@pytest.mark.parametrize("stage", ["1", "2"])
def test_many_micro_batches_add_up_as_well_as_one(stage: str, world: World) -> None:
    exact = gradient(world, 1, "--train.dtype", "fp32")
    in_bf16 = ("--train.dtype", "bf16", "--train.zero_stage", stage)
    one, many = (error(gradient(world, parts, *in_bf16), exact) for parts in (1, SAMPLES))
    assert many < 1.5 * one


def errors_on_ranks(world: World) -> list[float]:
    exact = gradient(world, 1, "--train.dtype", "fp32")
    flags = ("--train.dtype", "bf16", "--train.zero_stage")
    return [error(gradient(world, SAMPLES // 2, *flags, stage), exact) for stage in ("1", "2")]


def test_ranks_add_up_in_float32(world: World, two_ranks: TwoRanks) -> None:
    exact = gradient(world, 1, "--train.dtype", "fp32")
    one = error(gradient(world, 1, "--train.dtype", "bf16"), exact)
    for errors in two_ranks(errors_on_ranks):
        assert max(errors) < 1.5 * one


def test_a_user_may_reduce_in_bfloat16(tmp_path: Path, world: World) -> None:
    path = tmp_path / "narrow.json"
    path.write_text('{"data_types": {"grad_accum_dtype": "bf16"}}')
    exact = gradient(world, 1, "--train.dtype", "fp32")
    wide, narrow = (
        error(gradient(world, SAMPLES, "--train.dtype", "bf16", *flags), exact)
        for flags in ((), ("--train.deepspeed_config", str(path)))
    )
    assert narrow > 1.3 * wide
