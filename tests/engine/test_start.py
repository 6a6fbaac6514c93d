"""Two ranks start from the weights of one process, and none of them holds all of them for it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn

from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config, on_one_rank
from simvq_moe.core.shares import in_shares, move, share_of
from simvq_moe.core.usage import counters
from simvq_moe.costs.rank import Plan
from simvq_moe.engine.build import make_engine
from simvq_moe.engine.sharding import gathered, hand_over
from simvq_moe.engine.world import World, start_distributed
from simvq_moe.moe import MoE
from simvq_moe.records.bank_metrics import Banks
from simvq_moe.tasks.registry import build_model
from simvq_moe.training.loop import Trainer
from tests.launching import ROOT, on_ranks
from tests.live_memory import peak_bytes
from tests.two_ranks import TwoRanks

SMALL = (
    *("--task", "language_model", "--data.vocabulary", "260", "--data.context", "16"),
    *("--language_model.width", "64", "--language_model.layers", "2", "--moe.experts", "8"),
    *("--moe.top_k", "2", "--moe.hidden", "64", "--train.batch_size", "16"),
    *("--train.probe_tokens", "0", "--data.source", str(ROOT / "tests" / "moe")),
)
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
FROM_DATA = (
    "--moe.router.kind self_selecting --moe.router.init data --moe.expert_in_map.kind linear"
)
STAGE_3 = {
    "bf16": "--train.dtype bf16",
    "maps": "--moe.expert_out_map.kind linear --moe.router.map.kind linear",
    "untied": "--language_model.moe_every 0 --language_model.tied_head False",
    "data": FROM_DATA,
}
EXPERT_PARALLEL = {
    "plain": "",
    "separate": "--moe.expert_out_map.kind separate --moe.expert.kind swiglu",
    "keys": "--moe.router.kind self_selecting --moe.expert.kind swiglu",
}
DEEP = ("--language_model.layers", "12", "--train.dtype", "bf16", "--data.context", "8")


def configured(folder: Path, name: str, *flags: str) -> Config:
    where = ("--runs_dir", str(folder), "--name", name, "--data.cache_dir", str(folder / "cache"))
    return with_flags(Config(), [*SMALL, *where, *flags], "train")


def at_stage_3(folder: Path, name: str, *flags: str) -> Config:
    zero = ("--train.zero_stage", "3", "--train.deepspeed_config", str(folder / "sharded.json"))
    return configured(folder, name, *zero, *flags)


@contextlib.contextmanager
def started(config: Config, world: World) -> Iterator[Trainer]:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(Trainer(config, world, lambda: False)) as trainer:
        yield trainer


def held_bytes(model: nn.Module) -> int:
    """Bytes of parameters, wherever this rank has them."""
    parameters: list[Any] = list(model.parameters())
    shares = [getattr(p, "ds_tensor", None) for p in parameters]
    shares += [share.data for p in parameters if (share := share_of(p))]
    tensors = [*parameters, *(share for share in shares if share is not None)]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@contextlib.contextmanager
def noting_what_is_held(held: list[int]) -> Iterator[None]:
    """By a rank, where DeepSpeed takes the model over."""
    initialize = deepspeed.initialize

    def noted(*, model: nn.Module, **rest: Any) -> Any:
        held.append(held_bytes(model))
        return initialize(model=model, **rest)

    deepspeed.initialize = noted
    try:
        yield
    finally:
        deepspeed.initialize = initialize


def same_weights(model: nn.Module, reference: nn.Module) -> bool:
    parts = dict(reference.named_parameters())
    return all(torch.equal(p, parts[name].to(p.dtype)) for name, p in model.named_parameters())


def one_rank(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    store = (folder / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    world, found = start_distributed(), {}
    for name, flags in STAGE_3.items():
        # what data start both ranks start together, so it is compared with another stage
        with started(configured(folder, f"{name}_1", *flags.split()), world) as trainer:
            reference = trainer.task.model
        config, held = at_stage_3(folder, name, *flags.split()), []
        with noting_what_is_held(held), started(config, world) as trainer:
            model = trainer.task.model
        said = Plan(build_model(config), config).on(ranks, 8).parameter_bytes
        with gathered(model):
            same = same_weights(model, reference)
            plain = same_weights(model, build_model(config))
        found[name] = {"held": held[0], "said": said, "same": same, "plain": plain}
    found["peak"] = peak_of_start(folder, world)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def peak_of_start(folder: Path, world: World) -> dict[str, int]:
    """The most bytes until DeepSpeed has the shares of a model whose blocks are small beside it,
    what the dry run says of that, of records in it and of a step, and the bytes of all weights."""
    config = at_stage_3(folder, "deep", *DEEP)
    plan = Plan(build_model(config), config)

    def start() -> None:
        with in_shares(world.rank, world.size):
            model = build_model(config)
        move(model, world.device)
        records = Banks(model, counters(model))
        settings = {"train_batch_size": 16, "bf16": {"enabled": True}}
        hand_over(model, settings | {"zero_optimization": {"stage": 3}})
        del records

    return {
        "peak": peak_bytes(start),
        "said": plan.start_bytes(world.size),
        "records": plan.record_bytes,
        "step": plan.on(world.size, 8).memory_bytes,
        "whole": 4 * (plan.dense + plan.experts),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found. Stage 3 replaces functions of torch, so none is in this process."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "sharded.json").write_text(json.dumps(SHARDED))
    on_ranks(one_rank, 2, folder, ranks=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("name", STAGE_3)
def test_at_stage_3_the_engine_is_given_what_a_dry_run_says_that_a_rank_holds(
    ranks: list[dict[str, Any]], name: str
) -> None:
    for found in ranks:
        assert found[name]["held"] < 1.2 * found[name]["said"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", STAGE_3)
def test_at_stage_3_the_weights_are_those_of_a_model_that_is_built_whole(
    ranks: list[dict[str, Any]], name: str
) -> None:
    for found in ranks:
        assert found[name]["same"]
        assert found[name]["plain"] == (name != "data")


@pytest.mark.distributed
def test_at_stage_3_the_start_takes_what_a_dry_run_says_and_less_than_the_weights(
    ranks: list[dict[str, Any]],
) -> None:
    for found in ranks:
        peak = found["peak"]
        assert 0.8 * peak["said"] < peak["peak"] < 1.05 * peak["said"]
        assert peak["peak"] - peak["records"] < 0.75 * peak["whole"]
        assert peak["peak"] < peak["step"]


def own_experts(world: World, folder: Path) -> list[bool]:
    """Whether this rank starts with its experts of a model that is built whole."""
    found = []
    for name, flags in EXPERT_PARALLEL.items():
        config = configured(folder, name, "--moe.expert_parallel", "2", *flags.split())
        whole = dict(build_model(on_one_rank(config)).named_parameters())
        with started(config, world) as trainer:
            for key, p in trainer.task.model.named_parameters():
                split = p.shape != whole[key].shape
                part = whole[key].chunk(world.size)[world.rank] if split else whole[key]
                found.append(torch.equal(p, part))
    return found


def peak_of_own_experts(world: World) -> tuple[int, int]:
    """The most bytes while a large layer is built of which this rank has half, and those of it."""
    sizes: dict[str, Any] = {"experts": 64, "top_k": 2, "expert_parallel": world.size}
    layer = MoE(128, 256, **sizes)
    own = sum(p.nbytes for p in layer.parameters())
    return peak_bytes(lambda: MoE(128, 256, **sizes)), own


@pytest.mark.distributed
def test_experts_of_a_rank_are_those_of_a_model_that_is_built_whole(
    tmp_path: Path, two_ranks: TwoRanks
) -> None:
    for found in two_ranks(own_experts, tmp_path):
        assert found
        assert all(found)


@pytest.mark.distributed
def test_a_rank_draws_the_experts_of_others_a_chunk_at_a_time(two_ranks: TwoRanks) -> None:
    for peak, own in two_ranks(peak_of_own_experts):
        assert peak < 1.7 * own


def test_below_stage_3_a_model_is_given_as_it_is(world: World) -> None:
    config = with_flags(Config(), SMALL, "train")
    held: list[int] = []
    with noting_what_is_held(held):
        model = build_model(config)
        make_engine(model, config, world)
    assert held == [sum(p.nbytes for p in model.parameters())]
