"""A dry run says what a rank holds and sends, and predicts the step of a cluster."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from simvq_moe.cli import main
from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.costs.activations import activation_bytes, kept_bytes, sample_cost
from simvq_moe.costs.cluster import Cluster, gpu_counts, predict, predictions, read_cluster
from simvq_moe.costs.rank import Plan, RankCosts
from simvq_moe.engine.build import make_engine
from simvq_moe.engine.step_phases import exchanged
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.tasks.registry import build_model
from simvq_moe.training.loop import Trainer
from tests.launching import ROOT
from tests.two_ranks import TwoRanks

SMALL = (
    *("--task", "language_model", "--data.vocabulary", "260", "--data.context", "16"),
    *("--language_model.width", "32", "--language_model.layers", "2", "--moe.experts", "8"),
    *("--moe.top_k", "2", "--moe.hidden", "8", "--train.batch_size", "16"),
)
H100 = ROOT / "configs" / "clusters" / "h100.yaml"
ROUND = Cluster(
    nodes=4,
    gpus_per_node=8,
    peak_tflops=100.0,
    efficiency=0.5,
    overhead_ms=0.0,
    memory_gb=80.0,
    memory_gb_per_s=1000.0,
    intra_node_gb_per_s=400.0,
    inter_node_gb_per_s=100.0,
    latency_us=1.0,
)


def config_of(flags: str) -> Config:
    return with_flags(Config(), [*SMALL, *flags.split()], "train")


def plan(flags: str = "") -> Plan:
    config = config_of(flags)
    return Plan(build_model(with_flags(config, ["--moe.expert_parallel", "1"], "train")), config)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("", torch.float32),
        ("--moe.expert.kind swiglu", torch.float32),
        ("--moe.expert.kind swiglu", torch.bfloat16),
        ("--moe.shared_experts 1 --moe.gates sigmoid", torch.float32),
        ("--moe.expert_out_map.kind linear --moe.expert_in_map.kind low_rank", torch.float32),
        ("--language_model.moe_every 0", torch.bfloat16),
        ("--language_model.moe_every 2 --language_model.tied_head False", torch.float32),
        ("--language_model.qk_norm True", torch.float32),
        ("--language_model.qk_norm True", torch.bfloat16),
        # 100 MiB of scores, made in pieces
        ("--data.vocabulary 50304", torch.float32),
    ],
)
def test_what_a_forward_pass_keeps_is_what_the_formula_says(flags: str, dtype: torch.dtype) -> None:
    model = build_model(config_of(flags)).to(dtype)
    assert isinstance(model, LanguageModel)
    kept, _ = kept_bytes(model, torch.randint(260, (32, 17)))
    # losses, weights in another precision and small buffers are left out
    assert activation_bytes(model, 32 * 16, dtype.itemsize) == pytest.approx(kept, rel=0.04)


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_whole_block() -> None:
    sizes = {}
    for layers in (1, 2):
        for again in (False, True):
            flags = f"--language_model.layers {layers} --train.activation_checkpointing {again}"
            model = build_model(config_of(flags))
            assert isinstance(model, LanguageModel)
            kept, _ = kept_bytes(model, torch.randint(260, (32, 17)))
            sizes[layers, again] = kept
            whole = 0 if not again else sizes[2, False] - sizes[1, False] if layers == 2 else None
            if whole is not None:
                expected = activation_bytes(model, 32 * 16, 4)
                assert expected == pytest.approx(kept + whole, rel=0.04)  # as above


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_optimizer_weights_and_gradients_are_those_of_the_engine(
    stage: int, world: World, tmp_path: Path
) -> None:
    (tmp_path / "none.json").write_text("{}")  # with it, one rank runs the stage as it is
    theirs = f"--train.deepspeed_config {tmp_path / 'none.json'}"
    config = config_of(f"--train.zero_stage {stage} {theirs}")
    model = build_model(config)
    rank = Plan(model, config).on(1, 16)
    engine: Any = make_engine(model, config, world)
    loss, _ = engine(torch.randint(260, (16, 17)))
    engine.backward(loss)
    engine.step()
    adam = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    states = [t for state in adam.state.values() for t in state.values() if t.ndim]
    masters = [] if stage == 0 else list(engine.optimizer.single_partition_of_fp32_groups)
    assert rank.optimizer_bytes == sum(t.numel() * 4 for t in states + masters)
    held = [*model.parameters(), *model.buffers()]
    assert rank.parameter_bytes == sum(t.numel() * t.element_size() for t in held)


def test_states_shrink_with_the_stage_and_the_ranks() -> None:
    for stage, parts in ((0, "pgo"), (1, "pg"), (3, "")):
        found = plan(f"--train.zero_stage {stage}")
        two, eight = found.on(2, 8), found.on(8, 2)
        for letter, name in zip("pgo", ("parameter", "gradient", "optimizer"), strict=True):
            before, after = (getattr(rank, f"{name}_bytes") for rank in (two, eight))
            frozen = found.frozen_bytes if letter == "p" else 0
            shared = 1 if letter in parts or (stage == 3 and letter == "g") else 4
            if letter == "g" and stage == 3:
                continue  # a bucket of whole ones beside the parts
            assert (before - frozen) / (after - frozen) == pytest.approx(shared, rel=0.01)


def test_a_rank_sends_what_a_ring_makes_it_send() -> None:
    found = plan("--train.accumulation 2")
    weights = 4 * (found.dense + found.experts)
    assert found.on(1, 16).dense_bytes + found.on(1, 16).expert_bytes == 0
    four = found.on(4, 4)
    counts = 2 * 8 * 2 * 8 * 2  # int64 of 8 experts of 2 layers, twice, each micro-batch
    sent = (3 * weights + counts) * 3 / 4
    assert four.dense_bytes + four.expert_bytes == pytest.approx(sent, rel=1e-6)
    second = plan("--train.accumulation 2 --train.zero_stage 2").on(4, 4)
    sent = (5 * weights + counts) * 3 / 4
    assert second.dense_bytes + second.expert_bytes == pytest.approx(sent, rel=1e-6)


def test_experts_on_several_ranks_travel_less_and_tokens_more() -> None:
    alone, shared = plan().on(8, 2), plan("--moe.expert_parallel 4").on(8, 2)
    assert alone.exchange_bytes == 0
    # rows of 32 float32 channels, two choices in two layers, there and back and their gradients
    assert shared.exchange_bytes == 4 * (2 * 16) * 2 * 2 * 32 * 4 * 3 // 4
    assert shared.dense_bytes == alone.dense_bytes
    # a quarter of them, among two ranks in place of eight
    assert shared.expert_bytes == pytest.approx(
        alone.expert_bytes / 4 * (1 / 2) / (7 / 8), rel=1e-6
    )
    # what it updates, and more for the whole gradients that it copies
    assert alone.update_bytes - shared.update_bytes == 6 * 4 * plan().experts * 3 // 4


def rank_of(ranks: int, **other: Any) -> RankCosts:
    nothing = dict.fromkeys(RankCosts.__dataclass_fields__, 0)
    return RankCosts(
        **(nothing | {"ranks": ranks, "tokens": 1000, "flops_per_token": 5e10} | other)
    )


def test_a_step_is_products_the_optimizer_and_communication() -> None:
    one = predict(rank_of(1, update_bytes=28 * 10**9), plan(), ROUND)
    assert one.compute_s == pytest.approx(1000 * 5e10 / 50e12)
    assert one.optimizer_s == pytest.approx(28e9 / 1e12)
    assert one.communication_s == 0
    assert one.mfu == pytest.approx(0.5 * 1.0 / 1.028)
    assert predict(rank_of(1), plan("--train.activation_checkpointing True"), ROUND).mfu == (
        pytest.approx(0.5 * 3 / 4)
    )
    slow = replace(ROUND, overhead_ms=5.0)
    parts = predict(rank_of(1), plan("--train.accumulation 2"), slow)
    assert parts.compute_s - one.compute_s == pytest.approx(2 * 5e-3)
    sent = {"dense_bytes": 10**11, "reductions": 3}
    node, all_nodes = (predict(rank_of(n, **sent), plan(), ROUND) for n in (8, 32))
    assert node.communication_s == pytest.approx(1e11 / 400e9 + 3 * 2 * 3e-6)
    assert all_nodes.communication_s == pytest.approx(1e11 / 100e9 + 3 * 2 * 5e-6)


def test_what_crosses_nodes_shares_their_network() -> None:
    exchanged = rank_of(32, exchange_bytes=10**9)
    inside = predict(exchanged, plan("--moe.expert_parallel 8"), ROUND)
    across = predict(exchanged, plan("--moe.expert_parallel 16"), ROUND)
    assert inside.communication_s == pytest.approx(1e9 / 400e9)
    # 8 of 15 others are elsewhere, and 8 GPUs send there by one network
    assert across.communication_s == pytest.approx(8 * 1e9 * 8 / 15 / 100e9)
    experts = predict(rank_of(32, expert_bytes=10**9), plan("--moe.expert_parallel 8"), ROUND)
    assert experts.communication_s == pytest.approx(8 * 1e9 / 100e9)


def test_a_table_keeps_the_batch_or_the_samples_of_a_gpu() -> None:
    assert gpu_counts(read_cluster(H100)) == [1, 8, 64, 512, 1024]
    found = predictions(plan("--moe.expert_parallel 8"), read_cluster(H100))
    assert [p.gpus for p in found["same_global_batch"]] == [8]
    assert [p.gpus for p in found["same_batch_per_gpu"]] == [8, 64, 512, 1024]
    assert {p.tokens_per_step / p.gpus for p in found["same_batch_per_gpu"]} == {32}


def test_a_tokenizer_costs_a_batch_once_and_every_sample_alike() -> None:
    config = with_flags(Config(), ["--quantizer.codes", "4096", "--data.image_size", "8"], "train")
    model = build_model(config)
    found = sample_cost(model, config)
    assert found.tokens == 4
    assert found.flops[0] == 2 * 4096 * 32 * 32  # rows @ W
    few = with_flags(config, ["--quantizer.codes", "1024"], "train")
    fewer = sample_cost(build_model(few), few)
    # a token meets every code once, whichever way the search takes
    assert found.flops[1] - fewer.flops[1] == 4 * 2 * (4096 - 1024) * 32
    kept, _ = kept_bytes(model.eval(), torch.rand(5, 3, 8, 8))
    assert found.kept_bytes(5, 4) == pytest.approx(kept, rel=0.01)  # scalars of means


def test_a_dry_run_with_a_cluster_prints_rank_and_predictions_and_builds_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    huge = ["--language_model.width", "8192", "--moe.hidden", "131072"]
    huge += ["--train.batch_size", "8192", "--train.dtype", "bf16"]
    assert main(["train", "--dry-run", "--cluster", str(H100), *SMALL, *huge]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["parameters"]["total"] > 30e9
    assert found["per_rank"]["ranks"] == 1024
    assert found["predictions"]["same_global_batch"][-1]["mfu"] > 0
    assert "1,024" in printed.err
    assert "! more than the 80 GB" in printed.err


def test_a_dry_run_of_a_tokenizer_says_what_a_rank_holds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--dry-run", "--data.image_size", "16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["flops_per_token"] > 0
    assert found["per_rank"]["activation_bytes"] > 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodes: 0", "nodes 0: use more than 0"),
        ("efficiency: 40", "efficiency 40.0 > 1"),
        ("gpus: 8", "unknown key gpus"),
    ],
)
def test_a_wrong_cluster_is_refused(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    key = text.split(":")[0]
    kept = [line for line in H100.read_text().splitlines() if not line.startswith(f"{key}:")]
    file.write_text("\n".join([*kept, text]))
    with pytest.raises(ConfigError, match=words):
        read_cluster(file)


def test_data_that_are_not_here_are_said_and_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data.source", "far/away", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "! would not start here: data.source 'far/away' does not exist" in printed.err
    assert json.loads(printed.out)["flops_per_token"] > 0
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_not_here_is_said_and_not_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert main(["train", "--image_tokenizer.lpips_weight", "1", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "! without the costs of LPIPS, whose network is not here" in printed.err
    assert "! would not start here: image_tokenizer.lpips_weight 1.0: " in printed.err
    assert json.loads(printed.out)["flops_per_token"] > 0


def test_a_cluster_that_is_no_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "--cluster", "nowhere.yaml"]) == 2
    assert "--cluster nowhere.yaml is no file" in capsys.readouterr().err


def test_a_cluster_without_a_dry_run_or_a_batch_that_fits_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--cluster", str(H100)]) == 2
    assert "add --dry-run" in capsys.readouterr().err
    flags = ["--dry-run", "--cluster", str(H100), "--train.batch_size", "5", *SMALL[:-2]]
    assert main(["train", *flags, "--moe.expert_parallel", "8"]) == 2
    assert "train.batch_size 5" in capsys.readouterr().err


class Call(NamedTuple):
    """A collective call."""

    name: str
    size: int
    """Bytes."""
    ranks: int


def calls_of_a_step(world: World, folder: Path, flags: list[str]) -> list[Call]:
    """Every collective call of a step."""
    where = ["--runs_dir", str(folder), "--data.cache_dir", str(folder / "cache")]
    config = with_flags(Config(), [*flags, *where], "train")
    config.run_dir.mkdir(parents=True, exist_ok=True)
    calls: list[Call] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            out = args[0] if args else kwargs["tensor" if "tensor" in kwargs else "output_tensor"]
            ranks = dist.get_world_size(kwargs.get("group"))
            calls.append(Call(function.__name__, out.numel() * out.element_size(), ranks))
            return function(*args, **kwargs)

        return call

    with contextlib.closing(Trainer(config, world, lambda: False)) as trainer:
        trainer.update()
        with exchanged(noted):
            trainer.update()
    return calls


@pytest.mark.distributed
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--train.accumulation 2",
        "--train.zero_stage 2 --train.accumulation 2",
        "--train.zero_stage 0",
        "--train.clip 1 --optimizer.weight_decay 0.1",
        "--train.dtype bf16",
        "--moe.balance.kind loss_free --train.accumulation 2",
        "--moe.balance.kind quantile",
        "--moe.router.whiten.kind full",
        "--moe.expert_parallel 2 --train.accumulation 2",
        "--moe.expert_parallel 2 --train.activation_checkpointing True",
        "--moe.expert_parallel 2 --train.zero_stage 0",
        "--moe.expert_parallel 2 --train.zero_stage 2 --optimizer.weight_decay 0.1",
    ],
)
def test_a_step_makes_the_collective_calls_that_are_said(
    flags: str, tmp_path: Path, two_ranks: TwoRanks
) -> None:
    flags += f" --data.source {ROOT / 'tests' / 'moe'} --train.probe_tokens 0"
    calls = two_ranks(calls_of_a_step, tmp_path, [*SMALL, *flags.split()])[0]
    rank = plan(flags).on(2, 8)
    exchanges = [call for call in calls if call.name.startswith("all_to_all")]
    others = [call for call in calls if call not in exchanges]
    # of two ranks each sends all of what it reduces, and half of what it gathers
    sent = sum(c.size / (1 if c.name == "all_reduce" else 2) for c in others if c.ranks == 2)
    assert len(exchanges) == rank.exchanges
    assert len(others) == rank.reductions
    assert sent == pytest.approx(rank.dense_bytes + rank.expert_bytes, rel=0.01)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "ema --quantizer.restart 0.5 --train.accumulation 2",
        "ns_vq --quantizer.restart 0.5",
        "running_map --quantizer.residual_levels 2",
        "lfq --quantizer.codes 256",
        "ibq --quantizer.residual_levels 2 --train.accumulation 2",
    ],
)
def test_codebooks_add_up_in_a_step_what_is_said(
    flags: str, tmp_path: Path, two_ranks: TwoRanks
) -> None:
    given = "--quantizer.codes 64 --quantizer.width 8 --data.image_size 16 --train.batch_size 8"
    given += " --data.crops 64 --data.held_out_crops 16 --quantizer.kind " + (flags or "simvq")
    calls = two_ranks(calls_of_a_step, tmp_path, given.split())[0]
    config = with_flags(Config(), given.split(), "train")
    rank = Plan(build_model(config), config).on(2, 4)
    sent = sum(call.size / (1 if call.name == "all_reduce" else 2) for call in calls)
    assert len(calls) == rank.reductions
    assert sent == pytest.approx(rank.dense_bytes, rel=1e-3)
