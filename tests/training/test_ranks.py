"""Two ranks train what one trains, and a run goes on from what it saved, or says why not."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from simvq_moe.cli import main
from simvq_moe.config.schema import Config
from simvq_moe.engine.agreement import TrainingFailed
from simvq_moe.engine.world import World
from simvq_moe.runs import checkpoint, chunks
from simvq_moe.training.run import _without_a_rank
from tests.launching import ROOT, metrics, run_forked
from tests.short_training import train_flags
from tests.two_ranks import TwoRanks

IMAGE = ("--train.batch_size", "8", "--data.crops", "64", "--data.held_out_crops", "18")
TEXT = (
    *("--task", "language_model", "--data.vocabulary", "300"),
    *("--data.context", "32", "--moe.experts", "8", "--moe.top_k", "2", "--train.batch_size", "8"),
    *("--moe.balance.kind", "aux", "--moe.expert_out_map.kind", "linear", "--optimizer.lr", "3e-3"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a small corpus of real text: some of these tests."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "corpus").mkdir()
    for file in sorted((ROOT / "tests" / "core").glob("*.py")):
        (root / "corpus" / file.name).write_text(file.read_text())
    return root


def weights(run_dir: Path) -> Mapping[str, torch.Tensor]:
    step = (run_dir / "checkpoints" / "latest").read_text()
    return checkpoint.load_weights(run_dir / "checkpoints" / step)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("simvq", IMAGE),
        ("ema", (*IMAGE, "--quantizer.kind", "ema")),
        ("text", TEXT),
        ("accumulation", (*TEXT, "--train.accumulation", "2", "--train.clip", "0.5")),
        ("zero2", (*TEXT, "--train.zero_stage", "2")),
    ],
)
def test_two_ranks_see_the_same_counts_and_losses_as_one(
    folder: Path, world: World, two_ranks: TwoRanks, name: str, flags: tuple[str, ...]
) -> None:
    flags = (*flags, "--train.steps", "6", "--train.log_every", "1")
    if "--task" in flags:
        flags += ("--data.source", str(folder / "corpus"))
    one = train_flags(world, folder, "--name", f"{name}_1", *flags)
    two, _ = two_ranks(train_flags, folder, "--name", f"{name}_2", *flags)
    with np.load(one / "usage.npz") as a, np.load(two / "usage.npz") as b:
        np.testing.assert_array_equal(a["counts"][0], b["counts"][0])
        assert a["counts"].sum() == b["counts"].sum() > 0
        assert a["val_counts"].sum() == b["val_counts"].sum() > 0
    for line in metrics(two):
        # of maps that are learned, or of none
        spectra = {key.rsplit("/", 1)[-1] for key in line if "/condition" in key}
        assert not spectra or "val/loss" in line
    for key in ("train/loss", "val/loss", *(k for k in metrics(one)[-1] if k.endswith("_rank"))):
        losses = [[line[key] for line in metrics(r) if key in line] for r in (one, two)]
        # sums over ranks round differently, and Adam's first steps magnify it
        assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_copies_of_experts_split_over_two_ranks_train_what_one_process_does(
    folder: Path, world: World
) -> None:
    flags = (*TEXT, "--train.clip", "0.5", "--train.steps", "6", "--train.log_every", "1")
    flags += ("--data.source", str(folder / "corpus"))
    one = train_flags(world, folder, "--name", "experts_1", *flags)
    split = ("--name", "experts_4", "--moe.expert_parallel", "2")
    finished = run_forked("train", *flags, *split, cwd=folder, ranks=4)
    assert finished.returncode == 0, finished.stderr
    four = folder / "runs" / "experts_4"
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        values = [[line[key] for line in metrics(r) if key in line] for r in (one, four)]
        # sums over ranks round differently, and Adam's first steps magnify it
        assert_close(values[1], values[0], rtol=1e-4, atol=1e-5)
    assert_close(weights(four), weights(one))


def test_a_loss_that_is_not_finite_stops_with_the_last_good_step_and_checkpoint(
    folder: Path, world: World
) -> None:
    flags = (*IMAGE, "--optimizer.lr", "1e30", "--optimizer.warmup_steps", "0")
    with pytest.raises(TrainingFailed) as stopped:
        train_flags(world, folder, "--name", "nan", *flags, "--train.save_every", "1")
    last = str(stopped.value)
    saved = folder / "runs" / "nan" / "checkpoints" / "1"
    assert f"step 1 was the last good one (checkpoint {saved})" in last
    assert "not finite" in last or "gradient norm" in last


def test_a_broken_newest_checkpoint_is_skipped_for_the_one_before(
    folder: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    flags = (*IMAGE, "--name", "torn", "--train.steps", "8", "--train.save_every", "2")
    run_dir = train_flags(world, folder, *flags)
    whole = metrics(run_dir)
    assert sorted(p.name for p in (run_dir / "checkpoints").glob("[0-9]*")) == ["6", "8"]
    torn = run_dir / "checkpoints" / "8" / "optimizer_0.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    train_flags(world, folder, *flags)
    assert f"checkpoint {torn.parent} is skipped" in caplog.text
    assert metrics(run_dir) == whole


def test_the_saved_config_repeats_the_run_in_a_process_of_its_own(
    folder: Path, world: World
) -> None:
    first = train_flags(world, folder, *IMAGE, "--train.steps", "3", "--train.log_every", "1")
    flags = ("--config", str(first / "config.yaml"), "--name", "again")
    finished = run_forked("train", *flags, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    assert metrics(folder / "runs" / "again") == metrics(first)


def test_an_error_found_with_the_data_leaves_no_run_behind(
    folder: Path, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del world
    monkeypatch.chdir(folder)
    flags = ("--task", "language_model", "--data.source", "corpus", "--data.vocabulary", "60000")
    assert main(["train", "--name", "too_large", *flags]) == 2
    assert "data.vocabulary" in capsys.readouterr().err.splitlines()[-1]
    assert not (folder / "runs" / "too_large").exists()


def test_a_run_does_not_go_on_with_other_data(
    folder: Path, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    source = Path("changing")
    shutil.copytree("corpus", source)
    flags = (*TEXT, "--data.source", "changing", "--train.steps", "4", "--name", "changed")
    run_dir = train_flags(world, Path(), *flags)
    (source / "more.py").write_text("print('more')\n" * 100)
    kept = ("--runs_dir", "runs", "--data.cache_dir", "cache")
    assert main(["train", *flags, *kept]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "are not those that runs/changed began with" in error
    assert (run_dir / "checkpoints" / "4").is_dir()


def test_ranks_that_have_lost_one_name_the_newest_checkpoint_without_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a terabyte and 1,000 ranks that would be a petabyte from a shared file system."""
    config = replace(Config(), runs_dir=str(tmp_path), name="lost")
    others = World(5, 8, torch.device("cpu"))
    assert "(no checkpoint yet)" in _without_a_rank(config, others)
    (config.run_dir / "checkpoints" / "10").mkdir(parents=True)
    read: list[Path] = []
    monkeypatch.setattr(checkpoint, "read_bytes", read.append)
    monkeypatch.setattr(chunks, "open_regular", read.append)
    said = _without_a_rank(config, others)
    assert said.startswith("rank 5: another rank has ended (newest checkpoint: step 10)")
    assert not read
