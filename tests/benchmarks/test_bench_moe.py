"""The benchmark of MoE layers compares like with like, at a size that takes no time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from simvq_moe.benchmarks.moe import (
    FULL,
    LIMITS,
    QUICK,
    MoECase,
    assignments,
    bench_moe,
    layers,
    moe_cases,
    moe_table,
)
from simvq_moe.config.moe import MoEConfig
from simvq_moe.errors import ConfigError
from simvq_moe.moe.routers.topk import TopKRouter

SMALL = MoECase(width=16, hidden=8, experts=4, top_k=2, tokens=32)
OTHER_SUMS = {*LIMITS.values(), "DeepSpeed, capacity 1.0"}


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("load", "expected"), [("even", [32] + [32] * 7), ("skewed", [64] + [192 // 7] * 7)]
)
def test_routing_is_even_or_gives_half_of_the_tokens_to_one_expert(
    load: Any, expected: list[int], dtype: Any
) -> None:
    x, rows, ids = assignments(replace(SMALL, tokens=128, experts=8, load=load, dtype=dtype))
    router = TopKRouter(16, MoEConfig(8, 2))
    with torch.no_grad():
        router.bank.base.copy_(rows)
    chosen = router(x).ids
    assert_close(chosen.sort().values, ids.sort().values)
    counts = torch.bincount(chosen.flatten())
    assert_close(counts, torch.tensor(expected), atol=1, rtol=0)  # 192 do not divide by 7


@pytest.mark.parametrize("load", ["even", "skewed"])
def test_all_layers_with_one_kind_of_expert_are_the_same_function(load: Any) -> None:
    case = replace(SMALL, load=load, experts=6)
    x, rows, _ = assignments(case)
    found = layers(case, rows)
    assert {"DeepSpeed, no drops", "simvq-moe, shared map folded"} < set(found)
    for name in set(found) - OTHER_SUMS:
        kind, call, _ = found[name]
        assert_close(call(x), found[f"simvq-moe, {kind}"][1](x))


def test_a_dense_network_has_the_active_parameters_of_a_layer() -> None:
    _, rows, _ = assignments(SMALL)
    found = layers(SMALL, rows)
    for kind, limit in LIMITS.items():
        ours: Any = found[f"simvq-moe, {kind}"][2]
        assert size(found[limit][2]) == size(ours.experts) * SMALL.top_k / SMALL.experts


def test_every_contestant_is_compared_with_its_dense_network() -> None:
    cases = [SMALL, replace(SMALL, load="skewed"), replace(SMALL, dtype="bfloat16")]
    threads = torch.get_num_threads()
    results = bench_moe(cases, rounds=0)
    assert torch.get_num_threads() == threads
    assert all(r.seconds > 0 for r in results)
    assert all(r.relative == 1 for r in results if r.name == r.limit)
    names = {r.name for r in results}
    assert moe_table(results).count("\n| ") == 2 * (len(names) + 2)


def test_sizes_given_replace_those_of_the_preset() -> None:
    assert len(moe_cases(QUICK)) == 8
    assert len(moe_cases(FULL, tokens=(64,), top_k=())) == 48
    assert moe_cases(QUICK, experts=(8,), load=("even",), dtype=("float32",)) == [
        MoECase(experts=8)
    ]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (replace(SMALL, top_k=4, load="skewed"), "top_k 4 > 3"),
        (replace(SMALL, experts=17), "experts 17 > width 16"),
        (replace(SMALL, tokens=0), "tokens 0: --tokens takes at least 1"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(case: MoECase, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        bench_moe([case])
