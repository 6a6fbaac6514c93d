"""An MoE layer in other hands: saved, folded, built on meta, in inference mode, under DDP."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from simvq_moe import MoE
from simvq_moe.config.moe import MoEConfig
from simvq_moe.core.step_state import after_step
from simvq_moe.core.usage import counters, counting
from simvq_moe.moe.maps import DiagonalMap, LinearMap
from simvq_moe.moe.routers.cosine import CosineOptions
from simvq_moe.moe.routers.distance import DistanceOptions, DistanceRouter
from simvq_moe.moe.routers.topk import TopKOptions
from simvq_moe.moe.routing_measures import label_counts
from tests.shape_checks import without_shape_checks

WIDTH, EXPERTS, VOCABULARY = 8, 4, 11
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "maps": {
        "expert_in_map": "linear",
        "expert_out_map": "low_rank",
        "router": TopKOptions(map=DiagonalMap()),
    },
    "separate": {"expert_in_map": "separate", "expert_out_map": "separate"},
    "bias": {"expert_out_map": "linear", "expert_out_bias": True},
    "frozen": {"router": TopKOptions(map=LinearMap(base_width=3, train_base=False))},
    "noisy": {"router": "noisy_topk"},
    "cosine": {"router": CosineOptions(map=LinearMap())},
    "hyper": {"router": "hyper"},
    "distance": {"router": DistanceOptions(map=LinearMap(), init="data")},
    "selves": {"router": "self_selecting", "expert_in_map": "linear", "expert": "swiglu"},
    "expert choice": {"router": "expert_choice"},
    "hash": {"router": "hash", "vocabulary": VOCABULARY},
    "centred": {"router": TopKOptions(centre=True), "shared_experts": 1},
    "loss-free": {"balance": "loss_free", "gates": "sigmoid"},
    "quantile": {"balance": "quantile", "capacity_factor": 1.0},
}
IDS = torch.randint(VOCABULARY, (20,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=list(KINDS))
def build(request: pytest.FixtureRequest) -> Callable[[], MoE]:
    return partial(MoE, WIDTH, 6, EXPERTS, 2, **KINDS[request.param])


def trained(build: Callable[[], MoE]) -> MoE:
    torch.manual_seed(0)
    layer = build()
    layer(torch.randn(20, WIDTH), IDS)
    after_step(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer.eval()


def test_built_on_the_meta_device_and_filled_it_is_what_it_was(build: Callable[[], MoE]) -> None:
    whole, x = trained(build), torch.randn(20, WIDTH)
    for assign in (False, True):
        with torch.device("meta"):
            empty = build()
        if not assign:
            empty = empty.to_empty(device="cpu")
            for tensor in (*empty.buffers(), *empty.parameters()):
                tensor.detach().fill_(7)
        empty.load_state_dict(copy.deepcopy(whole.state_dict()), assign=assign)
        assert torch.equal(empty.eval()(x, IDS), whole(x, IDS))
        twin = copy.deepcopy(whole)
        for layer in (empty, twin):
            torch.manual_seed(1)
            layer.train()(x, IDS)
            after_step(layer)
        assert_close(empty.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_it_works_in_inference_mode_wherever_it_was_made(build: Callable[[], MoE]) -> None:
    whole, x = trained(build), torch.randn(20, WIDTH)
    expected = whole(x, IDS)
    with torch.inference_mode():
        inside = build().eval()
        inside.load_state_dict(whole.state_dict())
        assert torch.equal(whole(x, IDS), expected)
        with counting(inside):
            assert torch.equal(inside(x, IDS), expected)
    with torch.no_grad(), counting(inside) as found:
        inside(x, IDS)
        assert all(int(counter.counts.sum()) > 0 for counter in found)


def test_saved_and_folded_it_comes_back_as_it_was(build: Callable[[], MoE], tmp_path: Path) -> None:
    whole, x = trained(build), torch.randn(20, WIDTH)
    for i, layer in enumerate((whole, copy.deepcopy(whole).double().fold())):
        layer.float().save_pretrained(tmp_path / str(i))
        back = MoE.from_pretrained(tmp_path / str(i)).eval()
        assert torch.equal(back(x, IDS), layer(x, IDS))
        assert back.state_dict().keys() == layer.state_dict().keys()
        learned = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (back, layer)]
        assert learned[0] == learned[1]


def test_slow_averages_keep_their_precision(build: Callable[[], MoE]) -> None:
    layer = trained(build)
    before = {k: v for k, v in layer.state_dict().items() if k.endswith((".mean", "on.bias"))}
    layer.bfloat16()
    for name, value in before.items():
        assert torch.equal(layer.state_dict()[name], value), name


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", ["loss-free", "quantile", "centred", "plain"])
def test_counts_and_sums_are_no_buffers_that_ddp_would_overwrite(kind: str) -> None:
    layer = MoE(WIDTH, 6, EXPERTS, 2, **KINDS[kind])
    names = {name for name, _ in layer.named_buffers()}
    assert not {name for name in names if name.endswith(("counts", "pending"))}
    parallel = DistributedDataParallel(layer)
    parallel(torch.randn(20, WIDTH))
    assert int(counters(layer)[0].counts.sum()) == 40


def test_token_ids_of_every_integer_dtype_are_meant() -> None:
    layer, x = trained(partial(MoE, WIDTH, 6, EXPERTS, 2, **KINDS["hash"])), torch.randn(20, WIDTH)
    expected = layer(x, IDS)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16):
        assert torch.equal(layer(x, IDS.to(dtype)), expected)
    with (
        without_shape_checks(),
        pytest.raises(ValueError, match=r"token_ids of torch\.bool: give integers"),
    ):
        layer(x, IDS > 3)


def test_tokens_of_another_width_and_ids_of_another_shape_are_refused() -> None:
    layer = trained(partial(MoE, WIDTH, 6, EXPERTS, 2, **KINDS["hash"]))
    with without_shape_checks():
        with pytest.raises(ValueError, match=r"tokens \(3, 16\) have 16 channels .* width is 8"):
            layer(torch.randn(3, 2 * WIDTH), torch.zeros(6, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"token_ids \(3, 2\) for tokens \(2, 3, 8\)"):
            layer(torch.randn(2, 3, WIDTH), torch.zeros(3, 2, dtype=torch.int64))


def test_folding_draws_no_random_number_and_keeps_the_mode(build: Callable[[], MoE]) -> None:
    layer = trained(build)
    before = torch.get_rng_state()
    folded = layer.fold()
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in folded.modules())


def test_narrow_ids_and_labels_do_not_overflow() -> None:
    ids, labels = torch.tensor([[3], [2]]), torch.tensor([100, 90])
    expected = label_counts(ids, labels, EXPERTS, 120)
    assert torch.equal(label_counts(ids.to(torch.uint8), labels.to(torch.int8), 4, 120), expected)


@pytest.mark.usefixtures("unchecked")
def test_words_that_are_no_choice_are_refused_with_the_choices() -> None:
    for name in ("router", "gates", "balance", "expert", "expert_in_map", "expert_out_map"):
        unknown: dict[str, Any] = {name: "mine"}
        with pytest.raises(ValueError, match=rf"{name} 'mine': .* one of '\w+', '\w+'"):
            MoE(WIDTH, 6, EXPERTS, 2, **unknown)


@pytest.mark.parametrize("gates", ["topk_softmax", "sigmoid"])
def test_a_router_that_one_constant_gate_would_teach_nothing_warns(gates: Any) -> None:
    with pytest.warns(UserWarning, match=rf"top_k 1 with gates '{gates}': the one gate is always"):
        MoE(WIDTH, 6, EXPERTS, 1, gates=gates)
    # none of these is learned through the gate
    others: tuple[dict[str, Any], ...] = (
        {"router": "distance"},
        {"router": "hash", "vocabulary": 9},
    )
    for options in others:
        MoE(WIDTH, 6, EXPERTS, 1, gates=gates, **options)
    MoE(WIDTH, 6, EXPERTS, 1)
    MoE(WIDTH, 6, 1, 1, gates=gates)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_distances_far_from_the_origin_choose_the_nearest_row(offset: float) -> None:
    torch.manual_seed(0)
    router = DistanceRouter(16, MoEConfig(experts=32, top_k=2, router=DistanceOptions()))
    with torch.no_grad():
        router.get_parameter("bank.base").normal_().add_(offset)
    x = torch.randn(200, 16) + offset
    distance = (x[:, None].double() - router.get_parameter("bank.base").double()).square().sum(-1)
    routing = router(x)
    assert torch.equal(routing.ids[:, 0], distance.argmin(1))
    assert_close(routing.logits, (-distance / 4).float(), rtol=1e-3, atol=1e-3)
