"""The benchmark of training loops compares like with like."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from simvq_moe.benchmarks.train import (
    BARE,
    OURS,
    PRODUCTS,
    SHAPES,
    TRANSFORMERS,
    bench_train,
    config_of,
    mixtral_of,
    train_table,
    with_swiglu,
)
from simvq_moe.config.schema import Config, DataConfig
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.moe.expert_kinds import GeluExpert
from simvq_moe.tasks.registry import build_model
from tests.launching import ROOT

TINY = config_of(width=16, heads=2, layers=1, experts=4, top_k=2, hidden=8)


def test_the_mixtral_of_a_shape_has_as_many_parameters_as_our_model() -> None:
    for config in (TINY, SHAPES[0]):
        sizes = [
            sum(p.numel() for p in model.parameters())
            for model in (build_model(config), mixtral_of(config))
        ]
        assert sizes[0] == sizes[1]


def test_a_shape_of_ones_own_has_the_experts_of_a_mixtral() -> None:
    gelu = replace(TINY, moe=replace(TINY.moe, expert=GeluExpert()))
    assert with_swiglu(gelu) == TINY


def test_only_language_models_are_measured(world: World) -> None:
    with pytest.raises(ConfigError, match="task 'image_tokenizer'"):
        bench_train([Config()], world)


@pytest.mark.slow
@pytest.mark.distributed
def test_every_loop_is_measured_and_compared_with_the_bare_one(
    tmp_path: Path, world: World
) -> None:
    cache = str(tmp_path / "cache")
    data = DataConfig(source=str(ROOT / "tests" / "moe"), vocabulary=300, cache_dir=cache)
    results = bench_train([replace(TINY, data=data)], world, steps=2, rounds=1)
    assert [r.name for r in results] == [BARE, OURS, PRODUCTS, TRANSFORMERS, OURS, OURS]
    assert [r.ranks for r in results] == [1, 1, 1, 1, 1, 2]
    assert results[0].relative == results[4].relative == 1 > results[2].relative
    assert train_table(results).count("\n") == len(results) + 1
