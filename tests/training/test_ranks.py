"""Two ranks train what one trains, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from simvq_moe.training import checkpoint
from tests.launching import metrics, run, start

IMAGE = ("--train.batch_size", "8", "--data.crops", "64", "--data.held_out_crops", "18")
TEXT = (
    *("--task", "language_model", "--data.source", "corpus", "--data.vocabulary", "300"),
    *("--data.context", "32", "--moe.experts", "8", "--moe.top_k", "2", "--train.batch_size", "8"),
    *("--moe.balance", "aux", "--moe.expert_out_map", "linear", "--optimizer.lr", "3e-3"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a small corpus of real text: this test suite."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "corpus").mkdir()
    for file in sorted(Path(__file__).parent.parent.rglob("*.py")):
        (root / "corpus" / f"{file.parent.name}_{file.name}").write_text(file.read_text())
    return root


def train(folder: Path, name: str, *flags: str, ranks: int = 1) -> Path:
    finished = run("train", "--name", name, *flags, cwd=folder, ranks=ranks)
    assert finished.returncode == 0, finished.stderr
    return folder / "runs" / name


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
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
    folder: Path, name: str, flags: tuple[str, ...]
) -> None:
    flags = (*flags, "--train.steps", "6", "--train.log_every", "1")
    one = train(folder, f"{name}_1", *flags)
    two = train(folder, f"{name}_2", *flags, ranks=2)
    with np.load(one / "usage.npz") as a, np.load(two / "usage.npz") as b:
        np.testing.assert_array_equal(a["counts"][0], b["counts"][0])
        assert a["counts"].sum() == b["counts"].sum() > 0
        assert a["val_counts"].sum() == b["val_counts"].sum() > 0
    for key in ("train/loss", "val/loss"):
        losses = [[line[key] for line in metrics(r) if key in line] for r in (one, two)]
        # sums over ranks round differently, and Adam's first steps magnify it
        assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_copies_of_experts_split_over_two_ranks_train_what_one_process_does(
    folder: Path,
) -> None:
    flags = (*TEXT, "--train.clip", "0.5", "--train.steps", "6", "--train.log_every", "1")
    one = train(folder, "experts_1", *flags)
    four = train(folder, "experts_4", *flags, "--moe.expert_parallel", "2", ranks=4)
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        values = [[line[key] for line in metrics(r) if key in line] for r in (one, four)]
        # sums over ranks round differently, and Adam's first steps magnify it
        assert_close(values[1], values[0], rtol=1e-4, atol=1e-5)
    assert_close(weights(four), weights(one))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "flags", "ranks"),
    [
        ("image", (*IMAGE, "--quantizer.kind", "ema"), 1),
        ("text", (*TEXT, "--train.accumulation", "2"), 2),
        ("bf16", (*TEXT, "--train.dtype", "bf16", "--moe.router_map", "linear"), 2),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    folder: Path, name: str, flags: tuple[str, ...], ranks: int
) -> None:
    flags = (*flags, "--train.steps", "300", "--train.log_every", "7", "--train.save_every", "50")
    whole = train(folder, f"{name}_whole", *flags, ranks=ranks)
    process = start("train", "--name", f"{name}_broken", *flags, cwd=folder, ranks=ranks)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    broken = folder / "runs" / f"{name}_broken"
    assert not (broken / "summary.json").exists(), "finished before the signal: raise train.steps"
    stopped_at = int((broken / "checkpoints" / "latest").read_text())
    assert 0 < stopped_at < 300
    resumed = run("train", "--name", f"{name}_broken", *flags, cwd=folder, ranks=ranks)
    assert f"resuming runs/{name}_broken at step {stopped_at}" in resumed.stderr
    assert metrics(broken) == metrics(whole)
    with np.load(whole / "usage.npz") as a, np.load(broken / "usage.npz") as b:
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    assert_close(weights(broken), weights(whole), rtol=0, atol=0)


def test_a_run_killed_while_it_saves_goes_on_as_if_nothing_had_happened(folder: Path) -> None:
    flags = (*IMAGE, "--train.steps", "60", "--train.log_every", "1", "--train.save_every", "1")
    whole = train(folder, "whole", *flags)
    process = start("train", "--name", "killed", *flags, cwd=folder)
    killed = folder / "runs" / "killed"
    while process.poll() is None and checkpoint.committed_steps(killed / "checkpoints")[-1:] < [3]:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (killed / "summary.json").exists(), "finished before the signal: raise train.steps"
    resumed = run("train", "--name", "killed", *flags, cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming runs/killed at step" in resumed.stderr
    assert metrics(killed) == metrics(whole)
    assert_close(weights(killed), weights(whole), rtol=0, atol=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_130(folder: Path, number: signal.Signals) -> None:
    flags = (*IMAGE, "--train.steps", "100000", "--train.log_every", "5")
    process = start("train", "--name", f"stopped_{number.name}", *flags, cwd=folder)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "which is saved" in err
    assert (folder / "runs" / f"stopped_{number.name}" / "checkpoints" / "latest").exists()


def test_a_loss_that_is_not_finite_stops_with_the_last_good_step_and_checkpoint(
    folder: Path,
) -> None:
    flags = (*IMAGE, "--optimizer.lr", "1e30", "--optimizer.warmup_steps", "0")
    stopped = run("train", "--name", "nan", *flags, "--train.save_every", "1", cwd=folder)
    assert stopped.returncode == 1
    last = stopped.stderr.strip().splitlines()[-1]
    assert "step 1 was the last good one (checkpoint runs/nan/checkpoints/1)" in last
    assert "not finite" in last or "gradient norm" in last


def test_a_broken_newest_checkpoint_is_skipped_for_the_one_before(folder: Path) -> None:
    flags = (*IMAGE, "--train.steps", "40", "--train.save_every", "10")
    run_dir = train(folder, "torn", *flags)
    (run_dir / "summary.json").unlink()
    whole = metrics(run_dir)
    assert sorted(p.name for p in (run_dir / "checkpoints").glob("[0-9]*")) == ["30", "40"]
    torn = run_dir / "checkpoints" / "40" / "optimizer_0.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    resumed = run("train", "--name", "torn", *flags, cwd=folder)
    assert resumed.returncode == 0
    assert "checkpoint runs/torn/checkpoints/40 is skipped" in resumed.stderr
    assert "resuming runs/torn at step 30" in resumed.stderr
    assert metrics(run_dir) == whole


def test_the_saved_config_repeats_the_run(folder: Path) -> None:
    first = train(folder, "first", *IMAGE, "--train.steps", "3", "--train.log_every", "1")
    again = train(folder, "again", "--config", str(first / "config.yaml"), "--name", "again")
    assert metrics(again) == metrics(first)


def test_an_error_found_with_the_data_leaves_no_run_behind(folder: Path) -> None:
    flags = ("--task", "language_model", "--data.source", "corpus", "--data.vocabulary", "60000")
    refused = run("train", "--name", "too_large", *flags, cwd=folder)
    assert refused.returncode == 2
    assert "data.vocabulary" in refused.stderr.splitlines()[-1]
    assert not (folder / "runs" / "too_large").exists()


def test_a_run_does_not_go_on_with_other_data(folder: Path) -> None:
    source = folder / "changing"
    shutil.copytree(folder / "corpus", source)
    flags = (*TEXT, "--data.source", "changing", "--train.steps", "4")
    run_dir = train(folder, "changed", *flags)
    (run_dir / "summary.json").unlink()
    (source / "more.py").write_text("print('more')\n" * 100)
    refused = run("train", "--name", "changed", *flags, cwd=folder)
    assert refused.returncode == 2
    assert "are not those that runs/changed began with" in refused.stderr.splitlines()[-1]
    assert (run_dir / "checkpoints" / "4").is_dir()
