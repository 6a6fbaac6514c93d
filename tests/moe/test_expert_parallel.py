"""Experts split over two ranks compute what one process with all of them does, gradients too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from simvq_moe import MoE
from simvq_moe.core.bank import Bank
from simvq_moe.engine.world import World
from simvq_moe.moe.deepspeed_baseline import DeepSpeedCapacityMoE
from simvq_moe.moe.maps import LinearMap, NoMap
from simvq_moe.moe.routers.topk import TopKOptions
from tests.two_ranks import TwoRanks

RANKS, WIDTH, EXPERTS = 2, 8, 6
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "maps": {
        "expert_out_map": "linear",
        "expert_in_map": "low_rank",
        "router": TopKOptions(map=LinearMap()),
    },
    "per expert": {"expert_out_map": "separate", "expert_in_map": "separate"},
    "swiglu": {"expert": "swiglu", "shared_experts": 1, "expert_in_map": "diagonal"},
    "frozen experts": {
        "expert_in_map": NoMap(train_base=False),
        "expert_out_map": LinearMap(train_base=False),
    },
    "capacity": {"capacity_factor": 4.0},
    "self-selecting": {"router": "self_selecting", "expert_in_map": "linear"},
    "self-selecting swiglu": {"router": "self_selecting", "expert": "swiglu"},
}
TOKENS = {"even": (5, 5), "uneven": (2, 9), "a rank without": (0, 6), "nobody": (0, 0)}


def layer(expert_parallel: int, **options: Any) -> MoE:
    torch.manual_seed(0)
    moe = MoE(WIDTH, 4, EXPERTS, 2, expert_parallel=expert_parallel, **options).double()
    moe.reset(0.5, 0.5)
    with torch.no_grad():
        for bank in (moe.experts.up, moe.experts.down):
            for i, p in enumerate(bank.maps):
                shared = p if bank.shared else p[:1]
                p += torch.sin(torch.arange(shared.numel()) + i).view(shared.shape)
    return moe


def batch(tokens: int, rank: int, *, skewed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, WIDTH, dtype=torch.float64, generator=generator)
    return x[:1].repeat(tokens, 1) if skewed else x


def run(moe: MoE, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, and gradients of a sum over tokens with regard to the input and every parameter."""
    x = x.requires_grad_()
    y = moe(x)
    y.sin().sum().backward()
    assert x.grad is not None
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in moe.named_parameters()
    }
    return y.detach(), x.grad, gradients


def cases() -> list[tuple[dict[str, Any], tuple[int, int], bool]]:
    every = [(LAYERS[name], TOKENS["uneven"], False) for name in LAYERS]
    return every + [(LAYERS["maps"], t, skew) for t in TOKENS.values() for skew in (False, True)]


def one_rank(world: World, folder: Path) -> None:
    rank, found = world.rank, []
    for options, tokens, skewed in cases():
        moe = layer(RANKS, **options)
        x = batch(tokens[rank], rank, skewed=skewed)
        own = [p.requires_grad for p in moe.experts.parameters() if hasattr(p, "allreduce")]
        found.append((*run(moe, x), moe.usage, len(own)))
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.distributed
def test_two_ranks_give_outputs_and_gradients_of_one_process(
    tmp_path: Path, two_ranks: TwoRanks
) -> None:
    two_ranks(one_rank, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for i, (options, tokens, skewed) in enumerate(cases()):
        whole = layer(1, **options)
        xs = [batch(tokens[rank], rank, skewed=skewed) for rank in range(RANKS)]
        y, x_grad, gradients = run(whole, torch.cat(xs))
        assert_close(torch.cat([r[i][0] for r in ranks]), y)
        assert_close(torch.cat([r[i][1] for r in ranks]), x_grad)
        assert_close(ranks[0][i][3] + ranks[1][i][3], whole.usage)
        for name, expected in gradients.items():
            parts = [r[i][2][name] for r in ranks]
            split = parts[0].shape != expected.shape
            assert_close(torch.cat(parts) if split else parts[0] + parts[1], expected)
        learned = {p for p in whole.experts.parameters() if len(p) == EXPERTS}
        assert ranks[0][i][4] == len(learned)


def test_experts_that_do_not_divide_are_refused(world: World) -> None:
    assert world.size == 1
    with pytest.raises(ValueError, match=r"expert_parallel 4 must divide 1 ranks and 6 experts"):
        MoE(WIDTH, 4, EXPERTS, 2, expert_parallel=4)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("capacity_factor", [0.0, 8.0])
def test_deepspeeds_layer_without_drops_equals_ours(
    world: World, top_k: int, capacity_factor: float
) -> None:
    assert world.size == 1
    gates = "softmax_topk" if top_k == 1 else "topk_softmax"
    torch.manual_seed(0)
    ours = MoE(WIDTH, 4, EXPERTS, top_k, gates=gates)
    theirs = DeepSpeedCapacityMoE(WIDTH, 4, EXPERTS, top_k, capacity_factor=capacity_factor)
    for moe in (ours, theirs):
        torch.manual_seed(1)
        moe.reset(0.5, 0.5)
    x = torch.randn(3, 10, WIDTH)
    (y, routing), (z, same) = (m(x, with_routing=True) for m in (ours, theirs))
    assert_close(z, y)
    assert_close(same.ids, routing.ids)
    assert_close(same.gates, routing.gates)
    assert_close(theirs.usage, ours.usage)
    assert_close(theirs.kept.counts, ours.usage)
    y.sin().sum().backward()
    z.sin().sum().backward()
    bank = ours.router.bank
    assert isinstance(bank, Bank)
    assert isinstance(theirs.router_rows, nn.Parameter)
    assert_close(theirs.router_rows.grad, bank.base.grad)


def test_deepspeeds_layer_counts_what_it_drops(world: World) -> None:
    assert world.size == 1
    moe = DeepSpeedCapacityMoE(WIDTH, 4, EXPERTS, 2, capacity_factor=0.5)
    moe(torch.randn(30, WIDTH))
    assert int(moe.usage.sum()) == 60
    assert int(moe.kept.counts.max()) <= 5
    assert 0 < int(moe.kept.counts.sum()) < 60
