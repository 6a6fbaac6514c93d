"""The peak that a dry run says is the most that a rank holds: `!` is where it does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.core.usage import counters
from simvq_moe.costs.memory import Shares, gradients
from simvq_moe.costs.rank import Plan
from simvq_moe.engine.build import make_engine
from simvq_moe.engine.pieces import held_pieces, own_share
from simvq_moe.engine.world import World
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.records.bank_metrics import Banks
from simvq_moe.runs.saving import copies
from simvq_moe.tasks.registry import build_model
from tests.live_memory import peak_bytes

SMALL = (
    *("--task", "language_model", "--data.vocabulary", "260", "--data.context", "64"),
    *("--language_model.width", "64", "--language_model.layers", "3", "--moe.experts", "8"),
    *("--moe.top_k", "2", "--moe.hidden", "64", "--train.batch_size", "8"),
    *("--train.eval_batch_size", "1"),
)
LARGE = "--moe.experts 32 --data.context 16 --train.batch_size 2"
"""Weights that outweigh what the passes make."""
WIDE = "--language_model.width 128 --moe.hidden 128 --language_model.layers 2"
"""Stage 3 reduces smaller tensors earlier, and has up to an eighth less than is said."""
TRIES = 3
"""A thread of gloo may hold a bucket a moment longer than the step that reduced it."""
BF16, TWICE = "--train.dtype bf16", "--train.accumulation 2"


@pytest.fixture(autouse=True)
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO's stage 3 puts another function in the place of this one, for good."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)


@pytest.mark.filterwarnings("ignore:.*(all_gather_into|reduce_scatter)_tensor:FutureWarning")
@pytest.mark.parametrize(
    ("flags", "stage"),
    [
        ("", 0),
        ("--language_model.moe_every 0", 0),
        (LARGE, 0),
        (TWICE, 0),
        ("--train.activation_checkpointing True --train.batch_size 32", 0),
        ("--data.document_mask True", 0),
        ("--data.vocabulary 40000", 0),
        ("--train.eval_batch_size 64 --train.batch_size 2", 0),
        ("--moe.router.map.kind linear --moe.expert_out_map.kind linear", 0),
        (BF16, 1),
        (LARGE, 1),
        (f"{LARGE} {BF16}", 1),
        (f"{LARGE} {TWICE}", 1),
        (LARGE, 2),
        (f"{LARGE} {BF16} {TWICE}", 2),
        (f"{LARGE} {WIDE}", 3),
        (f"{LARGE} {WIDE} {BF16}", 3),
    ],
)
def test_the_peak_of_steps_and_an_evaluation_is_what_is_said(
    flags: str, stage: int, world: World, tmp_path: Path
) -> None:
    (tmp_path / "none.json").write_text("{}")  # with it, one rank runs the stage as it is
    settings = f"--train.zero_stage {stage}"
    settings += f" --train.deepspeed_config {tmp_path / 'none.json'}" if stage else ""
    config = with_flags(Config(), [*SMALL, *flags.split(), *settings.split()], "train")
    train, context = config.train, config.data.context
    said = Plan(build_model(config), config).on(1, train.batch_size).memory_bytes

    def run() -> None:
        torch.manual_seed(0)
        model = build_model(config)
        assert isinstance(model, LanguageModel)
        records = Banks(model, counters(model))
        engine: Any = make_engine(model, config, world)
        micro = train.batch_size // train.accumulation
        for _ in range(2 * train.accumulation):
            loss, _ = engine(torch.randint(260, (micro, context + 1)))
            engine.backward(loss)
            engine.step()
        if stage < 3:
            with torch.no_grad():
                model.eval().token_nats(torch.randint(260, (train.eval_batch_size, context + 1)))
        del records

    peaks = (peak_bytes(run) for _ in range(TRIES))
    assert any(peak == pytest.approx(said, rel=0.1) for peak in peaks)


@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor:FutureWarning")
@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_the_copy_that_is_saved_aside_is_as_large_as_is_said(
    stage: int, dtype: str, world: World, tmp_path: Path
) -> None:
    (tmp_path / "none.json").write_text("{}")
    settings = f"--train.zero_stage {stage} --train.deepspeed_config {tmp_path / 'none.json'}"
    config = with_flags(Config(), [*SMALL, *settings.split(), "--train.dtype", dtype], "train")
    aside = replace(config, train=replace(config.train, async_save=True))
    pieces = copies(own_share(held_pieces(make_engine(build_model(config), config, world))))
    assert Plan(build_model(config), config).on(1, 8).save_bytes == 0
    plan = Plan(build_model(aside), aside)
    assert plan.on(1, 8).save_bytes == sum(piece.data.nbytes for piece in pieces)
    assert plan.on(4, 2).save_bytes == plan.on(1, 8).save_bytes // 4


def test_buckets_and_owned_gradients_shrink_as_they_were_counted_on_two_ranks() -> None:
    """Multiples of the gradients of all parameters, which two ranks of a mixture held."""
    shares, grain = Shares(local=1000, owned=500, largest=100), 4

    def held(stage: int, size: int, ranks: int = 2) -> float:
        found = gradients(stage, shares, ranks, size=size, grain=grain, accumulates=False)
        return (found.always + found.last) / (grain * shares.local)

    assert [held(stage, 4) for stage in (0, 1, 2)] == [2.0, 2.0, 2.0]
    assert held(1, 2) == 2.5
    assert held(3, 4) == held(3, 2) == 3.5
    assert held(0, 4, ranks=1) == 1.0


def test_where_the_start_takes_more_than_a_step_it_is_said() -> None:
    """A block of 9 billion parameters is drawn in float32, of which 64 ranks update little each."""
    large = "--language_model.width 4096 --moe.hidden 16384 --moe.experts 64 --train.zero_stage 3"
    config = with_flags(Config(), [*SMALL, *large.split(), *BF16.split()], "train")
    with torch.device("meta"):
        model = build_model(config)
    plan = Plan(model, config)
    block = sum(p.numel() for p in model.get_submodule("blocks.0").parameters())
    share = (plan.dense + plan.experts) // 64
    said = plan.on(64, 8).memory_bytes
    assert said == pytest.approx(4 * (share + 2 * block) + plan.record_bytes, rel=1e-6)
    assert said < plan.start_bytes(1) < plan.on(1, 8).memory_bytes
