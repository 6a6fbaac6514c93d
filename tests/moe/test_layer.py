"""The MoE layer against a loop over tokens and experts in float64."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from simvq_moe import MoE
from simvq_moe.config.moe import MapOptions
from simvq_moe.config.registry import as_options, kinds
from simvq_moe.core.bank import Bank
from simvq_moe.moe.dispatch import within_capacity
from simvq_moe.moe.experts import grouped_product
from simvq_moe.moe.maps import LinearMap, LowRankMap
from simvq_moe.moe.routers.topk import TopKOptions, TopKRouter

WIDTH, HIDDEN, EXPERTS, TOP_K = 8, 6, 5, 2
MAPS: list[dict[str, Any]] = [
    {},
    {"expert_out_map": "linear"},
    {"expert_out_map": "diagonal"},
    {"expert_in_map": "linear"},
    {"router": TopKOptions(map=LinearMap(base_width=3, train_base=False))},
    {
        "expert_out_map": "linear",
        "expert_in_map": "diagonal",
        "router": TopKOptions(map=LinearMap()),
    },
    {"expert_out_map": "linear", "gates": "softmax_topk"},
    {"expert_out_map": LowRankMap(rank=2), "expert_in_map": "separate"},
    {
        "expert_out_map": "separate",
        "router": TopKOptions(map=LowRankMap()),
        "gates": "sigmoid",
    },
    {"expert": "swiglu", "expert_in_map": "linear", "expert_out_map": "diagonal"},
    {"expert": "swiglu", "expert_in_map": "separate", "shared_experts": 2},
    {"expert_out_bias": True, "expert_out_map": LinearMap(train_base=False)},
]
MAP_PARAMETERS = {"W", "A", "B", "out_bias"}


def layer(**options: Any) -> MoE:
    """A float64 layer whose maps have left the identity."""
    torch.manual_seed(0)
    moe = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K, **options).double()
    with torch.no_grad():
        for name, p in moe.named_parameters():
            if name.split(".")[-1] in MAP_PARAMETERS:
                p += 0.3 * torch.randn_like(p)
    return moe


def bank_of(moe: MoE) -> Bank:
    assert isinstance(moe.router, TopKRouter)
    return moe.router.bank


def by_hand(moe: MoE, x: Tensor) -> Tensor:
    """Each token's chosen experts, each with its folded rows, one after the other."""
    rows = bank_of(moe).rows()
    up, down = moe.experts.up.rows(), moe.experts.down.rows()
    bias = 0 if moe.experts.out_bias is None else moe.experts.out_bias
    out = []
    for token in x:
        scores = rows @ token
        chosen = scores.argsort(descending=True)[:TOP_K]
        y = torch.zeros_like(token)
        for g, e in zip(gates_by_hand(moe, scores, chosen), chosen, strict=True):
            y = y + g * (activated(moe.experts.expert.kind, up[e] @ token) @ down[e])
        if moe.shared_experts is not None:
            first, last = moe.shared_experts.up.weight, moe.shared_experts.down.weight
            y = y + last @ activated(moe.experts.expert.kind, first @ token)
        out.append(y + bias)
    return torch.stack(out)


def gates_by_hand(moe: MoE, scores: Tensor, chosen: Tensor) -> Tensor:
    if moe.router.gates == "sigmoid":
        return scores[chosen].sigmoid() / scores[chosen].sigmoid().sum()
    gates = scores.softmax(0)[chosen]
    return gates / gates.sum() if moe.router.gates == "topk_softmax" else gates


def activated(kind: str, x: Tensor) -> Tensor:
    if kind == "gelu":
        return F.gelu(x)
    half = len(x) // 2
    return x[:half] * x[:half].sigmoid() * x[half:]


@pytest.mark.parametrize("options", MAPS, ids=str)
def test_outputs_and_gradients_equal_the_sum_over_mapped_experts(options: dict[str, Any]) -> None:
    moe = layer(**options)
    x = torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    parameters = [x, *moe.parameters()]
    got = torch.autograd.grad(moe(x).square().sum(), parameters, retain_graph=True)
    expected = torch.autograd.grad(by_hand(moe, x).square().sum(), parameters)
    assert_close(moe(x), by_hand(moe, x))
    assert_close(got, expected)


@pytest.mark.parametrize("options", MAPS, ids=str)
def test_the_folded_layer_is_the_same_without_maps(options: dict[str, Any]) -> None:
    moe = layer(**options)
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    folded = moe.fold()
    assert_close(folded(x), moe(x))
    names = {name.split(".")[-1] for name, _ in folded.named_parameters()}
    assert not names & MAP_PARAMETERS


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gates": "softmax_topk"}, "only where a token's gates sum to 1: use 'topk_softmax'"),
        ({"capacity_factor": 1.0}, "dropped assignments would drop their part of b: use 0"),
    ],
)
def test_a_bias_that_no_expert_can_carry_is_not_folded(
    options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        layer(expert_out_bias=True, **options).fold()


def test_map_after_the_sum_equals_sum_of_mapped_experts() -> None:
    moe = layer(expert_out_map="linear")
    x = torch.randn(9, WIDTH, dtype=torch.float64)
    routing = moe.router(x)
    after_each = torch.zeros_like(x)
    for t in range(len(x)):
        for gate, e in zip(routing.gates[t], routing.ids[t], strict=True):
            counts = torch.eye(EXPERTS, dtype=torch.int64)[e]
            after_each[t] += gate * moe.experts.down.map(moe.experts(x[t : t + 1], counts)[0])
    assert_close(moe(x), after_each)


@pytest.mark.parametrize(
    ("site", "kind"),
    [
        (site, kind)
        for site in ("expert_out_map", "expert_in_map", "router")
        for kind in kinds(MapOptions)
        if (site, kind) != ("router", "separate")
    ],
)
def test_a_map_starts_as_the_identity_so_that_step_0_equals_the_baseline(
    site: str, kind: str
) -> None:
    torch.manual_seed(1)
    plain = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K)
    torch.manual_seed(1)
    made = as_options(MapOptions, kind, "map")
    mapped = MoE(
        *(WIDTH, HIDDEN, EXPERTS, TOP_K),
        **{site: TopKOptions(map=made) if site == "router" else made},  # pyright: ignore[reportArgumentType]
    )
    x = torch.randn(11, WIDTH)
    assert_close(mapped(x), plain(x), rtol=0, atol=0)


def test_a_router_of_another_width_leaves_the_experts_start_alone() -> None:
    torch.manual_seed(1)
    plain = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K)
    torch.manual_seed(1)
    options = TopKOptions(map=LinearMap(base_width=3))
    narrow = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K, router=options)
    assert_close(narrow.experts.up.base, plain.experts.up.base, rtol=0, atol=0)
    assert_close(torch.randn(3), torch.randn(3, generator=_same_stream()), rtol=0, atol=0)


def _same_stream() -> torch.Generator:
    torch.manual_seed(1)
    MoE(WIDTH, HIDDEN, EXPERTS, TOP_K)
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return generator


def test_one_step_moves_every_expert_under_a_shared_map_and_only_the_chosen_without() -> None:
    for kind, moved in (("none", 1), ("separate", 1), ("linear", EXPERTS)):
        moe = layer(expert_out_map=kind)
        x = torch.randn(1, WIDTH, dtype=torch.float64)
        with torch.no_grad():
            moe.router.top_k = 1
        before = moe.experts.down.rows().detach().clone()
        moe(x).square().sum().backward()
        torch.optim.SGD(moe.experts.parameters(), lr=0.1).step()
        change = (moe.experts.down.rows() - before).abs().amax(dim=(1, 2))
        assert int((change > 0).sum()) == moved


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 9),
    skew=st.floats(0, 30),
    seed=st.integers(0, 100),
)
def test_usage_counts_every_assignment_once(
    tokens: int, experts: int, top_k: int, skew: float, seed: int
) -> None:
    top_k = min(top_k, experts)
    torch.manual_seed(seed)
    moe = MoE(WIDTH, HIDDEN, experts, top_k)
    with torch.no_grad():
        bank_of(moe).base[0] += skew
    x = torch.randn(tokens, WIDTH)
    y = moe(x)
    assert y.shape == x.shape
    expected = torch.bincount(moe.router(x).ids.flatten(), minlength=experts)
    assert moe.usage.dtype == torch.int64
    assert_close(moe.usage, expected)
    moe.eval()(x)
    assert_close(moe.usage, expected)
    if tokens:
        y.sum().backward()
        assert moe.experts.up.base.grad is not None


def test_counting_stays_out_of_parameters_and_state_dict() -> None:
    moe = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K)
    assert not any("count" in name for name in moe.state_dict())
    assert not any("count" in name for name, _ in moe.named_parameters())


def test_too_many_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k 6 > experts 5: lower top_k or raise experts"):
        MoE(WIDTH, HIDDEN, EXPERTS, 6)


def test_a_frozen_router_base_is_no_parameter() -> None:
    options = TopKOptions(map=LinearMap(train_base=False))
    moe = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K, router=options)
    assert "router.bank.base" not in dict(moe.named_parameters())
    assert isinstance(bank_of(moe).W, nn.Parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [8, 7])
def test_grouped_products_are_the_products_of_each_group(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    counts = torch.tensor([3, 0, 5, 0, 1])
    x = torch.randn(9, width, dtype=dtype, requires_grad=True)
    weights = torch.randn(5, width, 16, dtype=dtype, requires_grad=True)
    expected = torch.cat([x[:3] @ weights[0], x[3:8] @ weights[2], x[8:] @ weights[4]])
    got = grouped_product(x, weights, counts)
    assert_close(got, expected)
    direction = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, (x, weights), direction) for y in (got, expected)]
    assert_close(*gradients)


@settings(deadline=None, max_examples=50)
@given(
    tokens=st.integers(0, 30),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 6),
    factor=st.floats(0.1, 2),
    seed=st.integers(0, 100),
)
def test_a_capacity_drops_what_an_expert_has_no_room_for_in_order(
    tokens: int, experts: int, top_k: int, factor: float, seed: int
) -> None:
    top_k = min(top_k, experts)
    torch.manual_seed(seed)
    ids = (torch.randn(tokens, experts) + torch.arange(experts)).topk(top_k).indices
    got = within_capacity(ids, experts, factor)
    room = dict.fromkeys(range(experts), ceil(factor * tokens * top_k / experts))
    for j in range(top_k):
        for t in range(tokens):
            e = int(ids[t, j])
            assert int(got[t, j]) == (e if room[e] > 0 else -1)
            room[e] -= 1


def test_dropped_assignments_add_nothing_and_are_counted() -> None:
    moe = layer(capacity_factor=0.5, expert_out_map="linear")
    x = torch.randn(20, WIDTH, dtype=torch.float64, requires_grad=True)
    routing = moe.router(x)
    kept = within_capacity(routing.ids, EXPERTS, 0.5)
    rows = moe.experts.up.rows(), moe.experts.down.rows()
    expected = torch.zeros_like(x)
    for t in range(len(x)):
        for gate, e in zip(routing.gates[t], kept[t], strict=True):
            if e >= 0:
                expected[t] += gate * (F.gelu(rows[0][e] @ x[t]) @ rows[1][e])
    assert_close(moe(x), expected)
    parameters = [x, *moe.parameters()]
    assert_close(
        torch.autograd.grad(moe(x).square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
    )
    assert moe.kept is not None
    assert_close(moe.usage, 2 * routing.counts)
    assert_close(moe.kept.counts, 2 * torch.bincount(kept[kept >= 0], minlength=EXPERTS))
