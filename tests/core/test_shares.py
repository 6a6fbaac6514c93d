"""A language model that is built in shares has the weights of one that is built whole."""

from __future__ import annotations

from typing import Any

import psutil
import pytest
import torch
from torch import nn

from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.core.shares import in_shares, is_away, keep_share, move, opened, share_of
from simvq_moe.tasks.registry import build_model
from tests.live_memory import peak_bytes

SMALL = (
    *("--task", "language_model", "--data.vocabulary", "260", "--language_model.width", "64"),
    *("--moe.experts", "8", "--moe.top_k", "2", "--moe.hidden", "64"),
)
KINDS = {
    "plain": "",
    "dense": "--language_model.moe_every 0 --language_model.tied_head False",
    "norms": "--language_model.qk_norm True --language_model.moe_every 2 --moe.expert.kind swiglu",
    "cosine": "--moe.router.kind cosine --moe.router.map.kind linear --moe.shared_experts 1",
    "maps": "--moe.expert_out_map.kind linear --moe.expert_in_map.kind low_rank",
    "bias": "--moe.expert_out_map.kind linear --moe.expert_out_bias True",
    "separate": "--moe.expert_out_map.kind separate",
    "keys": "--moe.router.kind self_selecting --moe.expert.kind swiglu",
    "frozen": "--moe.router.kind hyper --moe.expert_in_map.train_base False",
}


def configured(flags: str) -> Config:
    return with_flags(Config(), [*SMALL, *flags.split()], "train")


@pytest.mark.parametrize("kind", KINDS)
def test_the_shares_of_all_ranks_are_the_model_that_is_built_whole(kind: str) -> None:
    config, ranks = configured(KINDS[kind]), 3
    whole = build_model(config)
    later = torch.randn(3)
    models: list[Any] = []
    for rank in range(ranks):
        with in_shares(rank, ranks):
            models.append(build_model(config))
        assert torch.equal(torch.randn(3), later)
    for name, p in whole.named_parameters():
        parts = [model.get_parameter(name) for model in models]
        assert all(part.shape == p.shape for part in parts)
        if is_away(parts[0]):
            shares = torch.cat([share.data for part in parts if (share := share_of(part))])
            parts = [shares[: p.numel()].view(p.shape)]
        assert all(torch.equal(part, p) for part in parts), name
    for name, buffer in whole.named_buffers():
        assert all(torch.equal(model.get_buffer(name), buffer) for model in models)


def test_building_in_shares_takes_the_share_and_less_than_two_blocks() -> None:
    config, ranks = configured("--language_model.layers 12"), 8
    model: Any = build_model(config)
    whole, block = (4 * sum(p.numel() for p in m.parameters()) for m in (model, model.blocks[0]))

    def build() -> None:
        with in_shares(0, ranks):
            build_model(config)

    buffers = sum(b.nbytes for b in model.buffers()) + 2**17
    assert peak_bytes(build) < whole / ranks + 1.7 * block + buffers
    assert peak_bytes(lambda: build_model(config)) > whole


def test_what_pieces_leave_between_shares_goes_back_to_the_system() -> None:
    large = "--language_model.width 128 --language_model.layers 12 --moe.experts 32"
    config = configured(f"{large} --moe.hidden 256")
    build_model(configured(""))  # which imports all that it takes
    process = psutil.Process()
    before = process.memory_info().rss
    with in_shares(0, 2):
        model = build_model(config)
    taken = process.memory_info().rss - before
    assert taken < 0.75 * 4 * sum(p.numel() for p in model.parameters())


def test_what_is_away_has_its_shape_and_reads_as_nan() -> None:
    torch.manual_seed(0)
    with in_shares(1, 2):
        layer = keep_share(nn.Linear(3, 5, bias=False))
    move(layer, torch.device("cpu"))
    assert layer.weight.shape == (5, 3)
    assert layer.weight.isnan().all()
    assert layer.weight.untyped_storage().nbytes() == 4
    with opened(layer), torch.no_grad():
        layer.weight.copy_(torch.arange(15.0).view(5, 3))
    share = share_of(layer.weight)
    assert share is not None
    assert share.data.tolist() == [*range(8, 15), 0]
    assert keep_share(nn.Linear(3, 5)).weight.untyped_storage().nbytes() == 60
