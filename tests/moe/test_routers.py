"""Every router against a loop over tokens and experts in float64, and trained from the config."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from simvq_moe import MoE
from simvq_moe.config.moe import ExpertOptions, MapOptions, MoEConfig, RouterOptions
from simvq_moe.config.registry import as_options, kinds
from simvq_moe.core.ids import NOBODY
from simvq_moe.core.running_mean import RunningMean
from simvq_moe.core.step_state import after_step
from simvq_moe.core.whitening import Whitening
from simvq_moe.engine.world import World
from simvq_moe.moe.balances.base import load_balance_loss
from simvq_moe.moe.balances.loss_free import LossFreeBalance
from simvq_moe.moe.losses import z_loss
from simvq_moe.moe.maps import LinearMap, NoMap, SeparateMaps
from simvq_moe.moe.routers.base import Router, Routing, start_from_data
from simvq_moe.moe.routers.cosine import CosineOptions
from simvq_moe.moe.routers.distance import DistanceOptions, DistanceRouter
from simvq_moe.moe.routers.expert_choice import ExpertChoiceOptions
from simvq_moe.moe.routers.hash import HashRouter
from simvq_moe.moe.routers.hyper import HyperOptions
from simvq_moe.moe.routers.noisy_topk import NoisyTopKOptions, NoisyTopKRouter
from simvq_moe.moe.routers.self_selecting import SelfSelectingOptions
from simvq_moe.moe.routers.topk import TopKOptions, TopKRouter
from simvq_moe.moe.whitening import ChannelVariances, FullCovariance, LargestDirections
from tests.moe import naive
from tests.shape_checks import without_shape_checks
from tests.two_ranks import TwoRanks

WIDTH, HIDDEN, EXPERTS, TOP_K, VOCABULARY, TOKENS = 8, 6, 5, 2, 23, 7
NARROW = LinearMap(base_width=3, train_base=False)
LOW_RANK = LargestDirections(rank=3)
SELVES = SelfSelectingOptions(rank=3)
CASES: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk, frozen": {"router": TopKOptions(map=NoMap(train_base=False))},
    "topk, Q W": {"router": TopKOptions(map=NARROW)},
    "topk, centred": {"router": TopKOptions(centre=True), "gates": "sigmoid"},
    "topk, loss free": {"balance": "loss_free", "gates": "softmax_topk"},
    "topk, quantile": {"balance": "quantile", "gates": "sigmoid"},
    "noisy": {"router": "noisy_topk"},
    "noisy, Q W": {"router": NoisyTopKOptions(map=LinearMap()), "gates": "sigmoid"},
    "cosine": {"router": "cosine"},
    "cosine, Q W": {"router": CosineOptions(projection=4, map=NARROW)},
    "cosine, loss free": {"router": "cosine", "balance": "loss_free"},
    "hyper": {"router": "hyper"},
    "hyper, centred": {"router": HyperOptions(centre=True), "gates": "softmax_topk"},
    "distance": {"router": "distance"},
    "distance, Q W": {"router": DistanceOptions(map=NARROW)},
    "distance, codebook alone": {
        "router": DistanceOptions(map=NARROW, learns_from="codebook", commitment_weight=0.0),
    },
    "distance, Q W + b": {
        "router": DistanceOptions(map=LinearMap(), init="data", centre=True),
    },
    "selves": {"router": SELVES},
    "selves, frozen": {"router": replace(SELVES, train_base=False), "expert_in_map": "linear"},
    "selves, A": {"router": SELVES, "expert_in_map": "linear", "expert_out_map": "linear"},
    "selves, A, swiglu": {"router": SELVES, "expert_in_map": "low_rank", "expert": "swiglu"},
    "selves, centred": {
        "router": replace(SELVES, centre=True),
        "expert": "swiglu",
        "expert_in_map": "diagonal",
        "gates": "softmax_topk",
    },
    "selves, quantile": {"router": SELVES, "balance": "quantile"},
    "topk, bias": {"router": TopKOptions(bias=True)},
    "topk, whitened": {"router": TopKOptions(whiten=FullCovariance(), bias=True)},
    "topk, Q W, whitened": {
        "router": TopKOptions(map=NARROW, whiten=ChannelVariances()),
        "gates": "sigmoid",
    },
    "topk, low rank, loss free": {
        "router": TopKOptions(whiten=LOW_RANK),
        "balance": "loss_free",
    },
    "noisy, whitened": {"router": NoisyTopKOptions(whiten=FullCovariance())},
    "noisy, bias, whitened": {"router": NoisyTopKOptions(whiten=LOW_RANK, bias=True)},
    "hyper, whitened": {"router": HyperOptions(whiten=FullCovariance())},
    "hyper, bias, whitened": {"router": HyperOptions(whiten=LOW_RANK, bias=True)},
    "expert choice": {"router": "expert_choice"},
    "expert choice, whitened": {"router": ExpertChoiceOptions(whiten=FullCovariance())},
    "expert choice, Q W": {"router": ExpertChoiceOptions(map=NARROW, centre=True)},
    "hash": {"router": "hash"},
    "hash, capacity": {"router": "hash", "capacity_factor": 3.0},
}


def layer(**options: Any) -> MoE:
    """A float64 layer in which everything has left its start."""
    torch.manual_seed(0)
    moe = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K, vocabulary=VOCABULARY, **options).double()
    with torch.no_grad():
        for p in moe.parameters():
            p += 0.3 * torch.randn_like(p)
        if isinstance(moe.router.centre, Whitening):
            scales = torch.linspace(0.5, 2, WIDTH, dtype=torch.float64)
            moe.router.centre.collect(torch.randn(50, WIDTH, dtype=torch.float64) * scales + 0.3)
            after_step(moe.router.centre)
        elif moe.router.centre is not None:
            moe.router.centre.mean.normal_()
        if moe.router.selection is not None:
            moe.router.selection.bias.normal_(std=0.2)
    return moe


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def total(y: Tensor, losses: dict[str, Tensor]) -> Tensor:
    return y.sin().sum() + sum((i + 1) * losses[name] for i, name in enumerate(sorted(losses)))


def entered(router: Router, x: Tensor, token_ids: Tensor) -> Routing:
    return router(router.enter(x), token_ids)


def noise_of(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(TOKENS, EXPERTS, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_outputs_choices_losses_and_gradients_are_those_of_a_loop(case: str) -> None:
    moe, (x, ids) = layer(**CASES[case]), batch()
    expected_y, logits, chosen, losses = naive.run(moe, x, ids, noise_of(3))
    torch.manual_seed(3)
    y, routing = moe(x, ids, with_routing=True)
    assert_close(y, expected_y)
    assert_close(routing.logits, logits)
    assert [[e for e in row if e != NOBODY] for row in routing.ids.tolist()] == chosen
    assert routing.losses.keys() == losses.keys()
    assert_close(routing.losses, losses)
    parameters = [x, *moe.parameters()]
    got = torch.autograd.grad(total(y, routing.losses), parameters, allow_unused=True)
    wanted = torch.autograd.grad(total(expected_y, losses), parameters, allow_unused=True)
    for (name, _), a, b in zip([("x", x), *moe.named_parameters()], got, wanted, strict=True):
        zero = torch.zeros(())
        assert_close(
            zero if a is None else a,
            zero if b is None else b,
            msg=lambda m, name=name: f"{name}: {m}",
            check_dtype=False,
        )


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.startswith("hash") and "codebook alone" not in case]
)
def test_gradients_of_balance_and_z_loss_are_those_of_finite_differences(case: str) -> None:
    moe, (x, ids) = layer(**CASES[case]), batch()
    inputs = [x, *moe.router.parameters()]

    def loss() -> Tensor:
        torch.manual_seed(3)
        routing = entered(moe.router, x, ids)
        return load_balance_loss(routing.logits, routing.counts) + z_loss(routing.logits)

    gradients = torch.autograd.grad(loss(), inputs, allow_unused=True)
    directions = [torch.randn_like(p) for p in inputs]
    pairs = zip(gradients, directions, strict=True)
    slope = sum(float((g * d).sum()) for g, d in pairs if g is not None)
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):  # to one side, and to the other
            for p, d in zip(inputs, directions, strict=True):
                p += step * d
            values.append(float(loss()))
    # the difference of two numbers near 10 keeps 9 digits at this step
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_folded_layer_is_the_same_without_maps(case: str, training: bool) -> None:
    moe, (x, ids) = layer(**CASES[case]).train(training), batch()
    folded = moe.fold()
    torch.manual_seed(3)
    expected = moe(x, ids, with_routing=True)
    torch.manual_seed(3)
    got = folded(x, ids, with_routing=True)
    assert_close(got[0], expected[0])
    assert_close(tuple(got[1])[:3], tuple(expected[1])[:3])
    left = [name for name, _ in folded.named_parameters() if name.split(".")[-1] in "WAB"]
    assert not left


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_router_is_one_graph_with_the_same_results(case: str) -> None:
    moe, (x, ids) = layer(**CASES[case]), batch()
    twin = copy.deepcopy(moe.router)
    with without_shape_checks():
        torch.compiler.reset()  # of one function only so many graphs are kept
        compiled: Any = torch.compile(entered, backend="aot_eager", fullgraph=True)
        torch.manual_seed(3)
        got = compiled(twin, x, ids)
    torch.manual_seed(3)
    assert_close(tuple(got), tuple(entered(moe.router, x, ids)))
    assert_close(dict(twin.named_buffers()), dict(moe.router.named_buffers()))


@pytest.mark.parametrize("kind", kinds(RouterOptions))
@pytest.mark.parametrize("expert", kinds(ExpertOptions))
def test_experts_start_the_same_whatever_the_router(kind: str, expert: str) -> None:
    starts = []
    for router in ("topk", kind):
        torch.manual_seed(0)
        options: dict[str, Any] = {"vocabulary": VOCABULARY, "expert": expert, "shared_experts": 1}
        moe = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K, router=router, **options)
        moe.reset(0.1, 0.2)
        after = torch.randn(3)
        starts.append((moe.experts.down.base, moe.experts.up.base, moe.shared_experts, after))
    for i in (0, 3):
        assert_close(starts[1][i], starts[0][i], rtol=0, atol=0)
    assert_close(*(dict(start[2].named_parameters()) for start in starts), rtol=0, atol=0)
    up = starts[0][1][:, HIDDEN:] if kind == "self_selecting" else starts[0][1]
    if (kind, expert) != ("self_selecting", "gelu"):
        assert_close(starts[1][1], up, rtol=0, atol=0)


def test_a_noisy_router_repeats_under_a_seed_and_is_the_plain_one_in_evaluation() -> None:
    torch.manual_seed(0)
    plain = TopKRouter(WIDTH, MoEConfig(EXPERTS, TOP_K))
    torch.manual_seed(0)
    noisy = NoisyTopKRouter(WIDTH, MoEConfig(EXPERTS, TOP_K, router=NoisyTopKOptions()))
    x = torch.randn(9, WIDTH)
    logits = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        logits.append(noisy(x).logits)
    assert_close(logits[1], logits[0], rtol=0, atol=0)
    assert (logits[2] != logits[0]).all()
    assert_close(tuple(noisy.eval()(x))[:3], tuple(plain(x))[:3], rtol=0, atol=0)


@pytest.mark.parametrize(("vocabulary", "experts", "top_k"), [(64, 8, 1), (50, 8, 3), (5, 8, 8)])
def test_a_hash_is_balanced_over_the_vocabulary_and_repeats(
    vocabulary: int, experts: int, top_k: int
) -> None:
    tables = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        tables.append(HashRouter(vocabulary, MoEConfig(experts, top_k)).table)
    assert_close(tables[1], tables[0], rtol=0, atol=0)
    if top_k < experts:
        assert (tables[2] != tables[0]).any()
    loads = torch.bincount(tables[0].flatten(), minlength=experts)
    assert int(loads.max() - loads.min()) <= 1
    assert all(len(set(row)) == top_k for row in tables[0].tolist())


def test_expert_choice_gives_every_expert_its_share_and_leaves_tokens_out() -> None:
    torch.manual_seed(0)
    moe = MoE(WIDTH, HIDDEN, EXPERTS, 1, router="expert_choice")
    x = torch.randn(31, WIDTH)
    y, routing = moe(x, with_routing=True)
    assert_close(routing.counts, torch.full((EXPERTS,), 7))
    nobody = (routing.ids == NOBODY).all(1)
    assert nobody.any()
    assert_close(y[nobody], torch.zeros_like(y[nobody]))
    assert_close(moe(x[:0]), x[:0])


def test_a_running_mean_is_the_weighted_mean_of_all_steps_and_0_before_them() -> None:
    centre = RunningMean(3, decay=0.9)
    assert_close(centre.mean, torch.zeros(3).double())
    means, sizes = torch.randn(4, 3, dtype=torch.float64), (2, 5, 1, 3)
    for mean, size in zip(means, sizes, strict=True):
        for part in (mean + 1).expand(size, 3), (mean - 1).expand(size, 3):
            centre.collect(part)  # two micro-batches
        after_step(centre)
    weights = 0.9 ** torch.arange(3, -1, -1, dtype=torch.float64)
    assert_close(centre.mean, (weights[:, None] * means).sum(0) / weights.sum())
    after_step(centre)  # a step without tokens leaves it
    centre.eval().collect(torch.ones(2, 3))
    assert_close(centre.pending, torch.zeros(4).double())
    assert_close(centre.mean, (weights[:, None] * means).sum(0) / weights.sum())


@pytest.mark.parametrize("balance", ["loss_free", "quantile"])
def test_activations_that_are_computed_again_count_once(balance: Any) -> None:
    moe, (x, _) = layer(balance=balance, router=TopKOptions(centre=True)), batch()
    twin = copy.deepcopy(moe)
    moe(x).sum().backward()
    y: Any = checkpoint(twin, x, use_reentrant=False)
    y.sum().backward()
    assert_close(dict(twin.named_buffers()), dict(moe.named_buffers()))
    assert moe.router.selection is not None
    assert float(moe.router.selection.pending.sum()) > 0


def test_a_checkpoint_holds_biases_and_means_and_nothing_that_waits() -> None:
    names = set(layer(balance="quantile", router=TopKOptions(centre=True)).router.state_dict())
    assert names == {"bank.base", "centre.mean", "centre.steps", "selection.bias"}


STEPPED: tuple[dict[str, Any], ...] = (
    {"balance": LossFreeBalance(rate=0.05), "router": TopKOptions(centre=True)},
    {
        "balance": "quantile",
        "router": replace(SELVES, centre=True),
        "expert_in_map": "linear",
    },
    {"router": TopKOptions(whiten=FullCovariance()), "balance": "loss_free"},
    {"router": TopKOptions(whiten=ChannelVariances(every=2))},
    {"router": TopKOptions(whiten=LOW_RANK)},
)


def stepped(rank: int, ranks: int) -> list[dict[str, Tensor]]:
    """State of routers after three steps of two micro-batches, on this rank's share of them."""
    found = []
    for options in STEPPED:
        moe = layer(**options)
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            for part in torch.randn(2, 40, WIDTH, dtype=torch.float64, generator=generator) + 1:
                moe(part.split([13, 27])[rank] if ranks > 1 else part)
            after_step(moe)
        found.append(moe.router.state_dict())
    return found


def one_rank(world: World, folder: Path) -> None:
    torch.save(stepped(world.rank, world.size), folder / f"{world.rank}.pt")


@pytest.mark.distributed
def test_two_ranks_get_the_biases_and_means_of_one_process(
    tmp_path: Path, two_ranks: TwoRanks
) -> None:
    two_ranks(one_rank, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_close(second, first, rtol=0, atol=0)
    assert_close(first, stepped(0, 1))


@pytest.mark.parametrize("kind", ["linear", "diagonal"])
def test_a_distance_router_starts_with_the_moments_of_its_input(kind: Any) -> None:
    torch.manual_seed(0)
    frozen = replace(as_options(MapOptions, kind, "map"), train_base=False)
    options = DistanceOptions(map=frozen, init="data")
    router = DistanceRouter(WIDTH, MoEConfig(4000, TOP_K, router=options)).double()
    scales = torch.arange(1, WIDTH + 1)
    x = torch.randn(4000, WIDTH, dtype=torch.float64) * scales + 3
    router.start(x)
    rows = router.bank.rows().detach()
    # moments of 4,000 random rows
    assert_close(rows.mean(0), x.mean(0), rtol=0, atol=0.5)
    assert_close(rows.std(0), x.std(0), rtol=0.1, atol=0)


@pytest.mark.parametrize("map_", [NoMap(), LinearMap(), LinearMap(train_base=False)])
def test_keys_of_a_codebook_learn_by_its_loss_alone(map_: MapOptions) -> None:
    keys = {"map": map_, "commitment_weight": 0.0}
    options = DistanceOptions(**keys, learns_from="codebook", codebook_weight=3.0)
    torch.manual_seed(0)
    moe = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K, router=options).double()
    same = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K, router=DistanceOptions(**keys)).double()
    same.load_state_dict(moe.state_dict())
    x = torch.randn(40, WIDTH, dtype=torch.float64, requires_grad=True)
    own = list(moe.router.parameters())

    def task(layer: MoE) -> tuple[Tensor, Routing]:
        """What a language model makes of the outputs, and a balance loss of the logits."""
        out, routing = layer(x, with_routing=True)
        return out.sin().sum() + routing.logits.softmax(1).square().sum(), routing

    # the task reaches experts and inputs, and no rows
    loss, routing = task(moe)
    reached = [x, *moe.experts.parameters()]
    found = torch.autograd.grad(loss, [*own, *reached], allow_unused=True)
    assert own
    assert all(g is None for g in found[: len(own)])

    # forward values, and what else learns, are those of a router that learns from all
    theirs, _ = task(same)
    assert_close(loss, theirs)
    expected = torch.autograd.grad(theirs, [x, *same.experts.parameters()])
    assert_close(found[len(own) :], expected)

    # and the codebook loss is that of the chosen rows, without a gradient for the inputs
    own_loss = routing.losses["router_codebook"]
    g_x, *of_rows = torch.autograd.grad(own_loss, [x, *own], allow_unused=True)
    assert g_x is None
    assert isinstance(moe.router, DistanceRouter)
    rows = moe.router.bank.rows()
    chosen = torch.cdist(x, rows).topk(TOP_K, largest=False).indices
    by_hand = (rows[chosen] - x.detach()[:, None]).square().mean()
    assert_close(own_loss, by_hand)
    assert_close(tuple(of_rows), torch.autograd.grad(by_hand, own))


@pytest.mark.parametrize("kind", ["linear", "diagonal"])
def test_keys_start_along_the_directions_in_which_inputs_vary(kind: Any) -> None:
    options: dict[str, Any] = {"router": replace(SELVES, init="data"), "expert_in_map": kind}
    moe = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K, **options).double()
    scales = torch.arange(1, WIDTH + 1, dtype=torch.float64)
    x = torch.randn(4000, WIDTH, dtype=torch.float64) * scales + 3
    start_from_data(moe, x)
    assert moe.training
    assert moe.router.keys is not None
    W = moe.router.keys.matrix()
    assert_close(W.norm(), torch.tensor(WIDTH**0.5).double())
    expected = (scales / scales.norm() * WIDTH**0.5).diag()
    assert_close(W, expected, rtol=0, atol=0.05)  # the spread of 4,000 random inputs
    before = W.clone()
    moe(x)
    assert_close(moe.router.keys.matrix(), before)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"router": "expert_choice", "gates": "sigmoid"},
            "gates 'sigmoid' with router.kind 'expert_choice': its gates are the softmax over all",
        ),
        ({"router": "hash", "gates": "softmax_topk"}, "its gates are equal and sum to 1"),
        ({"router": "hash", "vocabulary": None}, "a table over the vocabulary: give its size"),
        ({"router": "hash", "balance": "quantile"}, "has no choice by biased scores: use 'none'"),
        ({"router": "hash", "balance": "aux"}, "has no scores: use 'none'"),
        (
            {"router": "expert_choice", "balance": "loss_free"},
            "balance.kind 'loss_free' means nothing to router.kind 'expert_choice'",
        ),
        ({"router": "expert_choice", "capacity_factor": 2.0}, "whose loads are even already"),
        (
            {"router": TopKOptions(whiten=FullCovariance(), centre=True)},
            "which centres as well: drop router.centre",
        ),
        ({"router": TopKOptions(whiten=LargestDirections(rank=WIDTH))}, "rank 8 >= width 8"),
        ({"router": TopKOptions(map=SeparateMaps())}, "rows are separate already"),
        ({"router": SELVES, "expert_in_map": "separate"}, "its keys are separate already"),
        ({"router": replace(SELVES, init="data")}, "sets expert_in_map, whose kind is 'none'"),
        ({"router": DistanceOptions(init="data")}, "sets router.map, whose kind is 'none'"),
        ({"expert_out_map": LinearMap(base_width=3)}, "expert_out_map.base_width 3"),
        ({"balance": "quantile", "top_k": EXPERTS}, "every expert is chosen: lower top_k"),
    ],
)
def test_what_can_not_be_built_says_why(options: dict[str, Any], reason: str) -> None:
    options = {"top_k": TOP_K, "vocabulary": VOCABULARY, **options}
    with pytest.raises(ValueError, match=reason):
        MoE(WIDTH, HIDDEN, EXPERTS, **options)


def test_a_hash_without_vocabulary_ids_says_what_is_missing() -> None:
    moe = layer(router="hash")
    with pytest.raises(ValueError, match="goes by vocabulary ids: pass token_ids to the layer"):
        moe(batch()[0])
