"""Runs over streams: exact to resume, the same on any ranks, ended with a name by broken data."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from simvq_moe.config.checks import check
from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.engine.agreement import Interrupted
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.runs import checkpoint
from simvq_moe.training.loop import Trainer
from tests.launching import metrics, run_forked
from tests.two_ranks import TwoRanks

FLAGS = (
    *("--task", "language_model", "--data.streaming", "True", "--data.vocabulary", "257"),
    *("--data.context", "16", "--data.held_out_documents", "20", "--data.shuffle_buffer", "8"),
    *("--data.document_mask", "True", "--moe.experts", "8", "--moe.top_k", "2"),
    *("--train.batch_size", "4", "--train.log_every", "1", "--train.probe_tokens", "0"),
    *("--language_model.layers", "1", "--language_model.width", "16"),
)


def write_rows(folder: Path, files: int = 4) -> Path:
    folder.mkdir()
    rows = [{"text": f"{folder.name} {i} " + "word " * (i % 13)} for i in range(300)]
    for i in range(files):
        lines = [json.dumps(row) + "\n" for row in rows[i::files]]
        (folder / f"{i}.jsonl").write_text("".join(lines))
    return folder


def flags(folder: Path, name: str, *more: str, steps: int = 8) -> list[str]:
    kept = ("--runs_dir", str(folder / "runs"), "--data.cache_dir", str(folder / "cache"))
    return [*FLAGS, *kept, "--name", name, "--train.steps", str(steps), *more]


def train(world: World, folder: Path, name: str, *more: str, steps: int = 8, stop: int = 0) -> Path:
    """A run in this process, until asked to stop after so many steps."""
    config = with_flags(Config(), flags(folder, name, *more, steps=steps), "train")
    check(config)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, world, lambda: trainer.step + 1 == stop)
    with contextlib.closing(trainer), contextlib.suppress(Interrupted):
        trainer.run()
    return config.run_dir


def weights(run_dir: Path) -> Mapping[str, torch.Tensor]:
    return checkpoint.load_weights(run_dir / "checkpoints" / "8")


def test_an_interrupted_and_resumed_stream_trains_what_an_undisturbed_one_does(
    tmp_path: Path, world: World
) -> None:
    for name in ("red", "blue"):
        write_rows(tmp_path / name)
    mixture = ("--data.sources", str(tmp_path / "red"), str(tmp_path / "blue"))
    mixture += ("--data.source_weights", "2", "1", "--train.accumulation", "2")
    undisturbed = train(world, tmp_path, "undisturbed", *mixture, "--data.prefetch", "0")
    for stop in (3, 5, 0):
        resumed = train(world, tmp_path, "resumed", *mixture, "--data.prefetch", "3", stop=stop)
    assert [line["train/loss"] for line in metrics(resumed)] == [
        line["train/loss"] for line in metrics(undisturbed)
    ]
    for (name, found), expected in zip(
        weights(resumed).items(), weights(undisturbed).values(), strict=True
    ):
        assert_close(found, expected, rtol=0, atol=0, msg=name)


@pytest.mark.distributed
def test_two_ranks_share_the_batches_of_one_and_go_on_where_it_was(
    tmp_path: Path, world: World, two_ranks: TwoRanks
) -> None:
    source = ("--data.source", str(write_rows(tmp_path / "rows", 3)))
    one = train(world, tmp_path, "one", *source)
    train(world, tmp_path, "moved", *source, stop=4)
    for name in ("two", "moved"):
        run_dir, _ = two_ranks(train, tmp_path, name, *source)
        found = [line["train/loss"] for line in metrics(run_dir)]
        # sums over ranks round differently, and Adam's first steps magnify it
        expected = [line["train/loss"] for line in metrics(one)]
        assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
def test_a_broken_shard_of_one_rank_ends_both_with_its_name_and_skip_goes_on(
    tmp_path: Path, world: World
) -> None:
    source = write_rows(tmp_path / "rows")
    on = ("--data.source", str(source), "--train.save_every", "2")
    train(world, tmp_path, "whole", *on, steps=1)  # it takes the held-out documents
    broken = source / "3.jsonl"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 3].ljust(len(content), b"x"))
    command = flags(tmp_path, "run", *on, steps=80)
    stopped = run_forked("train", *command, cwd=tmp_path, ranks=2)
    assert stopped.returncode == 1
    ours = [line for line in stopped.stderr.splitlines() if str(broken) in line]
    assert len(ours) == 1, stopped.stderr
    assert f"rank 1: {broken} line " in ours[0]
    assert "data.on_corrupt to skip" in ours[0]
    assert 'File "' not in stopped.stderr.split(ours[0])[0]
    meta = json.loads((tmp_path / "runs" / "run" / "meta.json").read_text())
    assert meta["status"] == "failed"
    done = run_forked("train", *command, "--data.on_corrupt", "skip", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "run"
    logged = [file.read_text() for file in (run / "log.txt", *(run / "logs").iterdir())]
    assert any(f"skipped {broken} line " in text for text in logged)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--task image_tokenizer", "data.streaming True with task 'image_tokenizer'"),
        ("--data.streaming False --data.sources a b", "data.sources ('a', 'b') means nothing"),
        ("--data.source a --data.sources b", "data.source 'a' with data.sources ('b',)"),
        ("--data.sources a b --data.source_weights 1", "give as many, each above 0"),
        ("--data.sources a b --data.source_weights 1 0", "give as many, each above 0"),
        ("--data.held_out_share 1", "data.held_out_share 1.0: use more than 0 and less than 1"),
        ("--data.shuffle_buffer 0", "data.shuffle_buffer 0 < 1"),
        ("--data.prefetch -1", "data.prefetch -1 < 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(more: str, message: str) -> None:
    streaming = ["--task", "language_model", "--data.streaming", "True"]
    with pytest.raises(ConfigError) as error:
        check(with_flags(Config(), [*streaming, *more.split()], "train"))
    assert message in str(error.value)
