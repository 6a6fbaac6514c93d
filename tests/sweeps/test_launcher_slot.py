"""Slots: runs under one launcher equal runs of a launcher each, and a loss costs one run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from simvq_moe.launcher_slot import LOST, Slot, Slots
from simvq_moe.sweeps.machine import Machine, stop
from tests.launching import environment, metrics, run, run_forked
from tests.sweeps.test_sweep import folder, in_background

assert folder  # a fixture

MACHINE = Machine(ranks=2, parallel=1, cores=2, gpus=())
CONFIG = """
quantizer: {codes: 16}
train: {steps: 6, batch_size: 8, log_every: 2, save_every: 3}
data: {crops: 64, held_out_crops: 18}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return tmp_path


def config_of(here: Path, name: str, more: str = "") -> tuple[Path, Path]:
    """A file, and the log beside it."""
    file = here / f"{name}.yaml"
    file.write_text(f"name: {name}\n{CONFIG}{more}")
    return file, here / f"{name}.log"


@pytest.mark.distributed
def test_one_launcher_starts_run_after_run_and_the_loss_of_a_rank_costs_one_run(here: Path) -> None:
    with Slots() as slots:
        first = slots(*config_of(here, "first"), MACHINE, ())
        assert first.wait() == 0, (here / "first.log").read_text()
        # one that fails by itself, on both ranks
        broken = slots(*config_of(here, "broken", "optimizer: {lr: 1e30}\n"), MACHINE, ())
        assert broken.wait() == 1
        assert "last good" in (here / "broken.log").read_text()
        saves_and_goes_on_in_its_slot(here, slots)
        (slot,) = slots.all
        killed = slots(*config_of(here, "killed", "optimizer: {lr: 2e-3}\n"), MACHINE, ())
        assert slots.all == [slot]
        rank_1(slot).kill()
        assert killed.wait() == LOST
        last = slots(*config_of(here, "last"), MACHINE, ())
        assert last.wait() == 0, (here / "last.log").read_text()
        assert len(slots.all) == 2
    assert not any(psutil.pid_exists(one.pid) for one in slots.all)
    # a run that no launcher has started, and which equals one of a launcher of its own
    alone = run_forked("train", "--config", "first.yaml", "--runs_dir", "alone", cwd=here, ranks=2)
    assert alone.returncode == 0, alone.stderr
    for name in ("runs/first", "runs/last"):
        assert metrics(here / name) == metrics(here / "alone/first")
        for file in (here / name / "checkpoints").rglob("*.safetensors"):
            same = here / "alone/first" / file.relative_to(here / name)
            assert file.read_bytes() == same.read_bytes(), file


def saves_and_goes_on_in_its_slot(here: Path, slots: Slots) -> None:
    """A run that is stopped."""
    long = "train: {steps: 900, save_every: 900, batch_size: 8, log_every: 2}\n"
    file, log = config_of(here, "long")
    file.write_text(file.read_text().replace(CONFIG.splitlines()[2] + "\n", long))
    started = slots(file, log, MACHINE, ())
    while not (log.is_file() and "step " in log.read_text()):
        assert started.poll() is None, log.read_text()
    stop([started])
    assert started.wait() == 130
    assert (here / "runs/long/checkpoints/latest").is_file()
    assert json.loads((here / "runs/long/meta.json").read_text())["status"] == "interrupted"
    again = slots(file, log, MACHINE, ())
    while "resum" not in log.read_text():
        assert again.poll() is None, log.read_text()
    stop([again])


def rank_1(slot: Slot) -> psutil.Process:
    """The process that the slot's launcher has started as rank 1."""
    every = psutil.Process(slot.pid).children(recursive=True)
    return next(
        one for one in every if one.environ().get("RANK") == "1" and os.getpgid(one.pid) == slot.pid
    )


@pytest.mark.distributed
def test_a_killed_sweep_leaves_its_run_to_the_next_and_no_process(folder: Path) -> None:
    (folder / "long.yaml").write_text("set: {train: {steps: 400}}\nname: long\n")
    files = ("--config", "sweep.yaml", "--config", "long.yaml", "--arms", "vq", "--launcher")
    command = ("sweep", *files, "--ranks", "2", "--parallel", "1")
    process = in_background(*command, cwd=folder)
    left = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = run(*command, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "goes on in another process" in again.stderr
    _, alive = psutil.wait_procs(left, timeout=30)
    assert alive == []
