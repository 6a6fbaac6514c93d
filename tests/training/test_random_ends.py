"""Kills at random moments and simultaneous starts, in numbers: nothing is ever lost."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from simvq_moe.runs.folder import has_summary
from simvq_moe.sweeps.machine import free_port
from tests.forked_commands import start
from tests.training.test_faults import IMAGE, TEXT, assert_same, write_corpus

KILLS, PAIRS = 20, 30
"""Of each kind of run; at a time."""
STEPS = ("--train.steps", "12", "--train.save_every", "1", "--train.log_every", "2")
SMALL = ("--data.image_size", "8", "--train.eval_every", "6")
KINDS = {
    "image": (1, (*IMAGE, *SMALL, *STEPS)),
    "text": (1, (*TEXT, "--moe.expert_parallel", "1", "--data.source", "corpus", *STEPS)),
    "two ranks": (2, (*TEXT, "--data.source", "corpus", *STEPS)),
    "two ranks that save aside": (
        2,
        (*TEXT, "--data.source", "corpus", *STEPS, "--train.async_save", "True"),
    ),
}
"""Number of ranks and flags."""
LONGEST_SAVE_S = 0.03
GRACE_S = 10.0

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ends")
    write_corpus(root / "corpus")
    return root


def train(folder: Path, name: str, ranks: int, flags: Sequence[str]) -> list[BaseProcess]:
    port = free_port()
    return [
        start(
            *("train", "--name", name, *flags),
            cwd=folder,
            log=folder / f"{name}.{rank}.log",
            rank=rank,
            ranks=ranks,
            port=port,
        )
        for rank in range(ranks)
    ]


def ended(folder: Path, name: str, processes: Sequence[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(timeout=600)
    codes = [process.exitcode for process in processes]
    assert None not in codes, (folder / f"{name}.0.log").read_text()
    return codes


def end_as_a_launcher_does(processes: Sequence[BaseProcess]) -> None:
    """Kill ranks that don't see by themselves that one is lost: before they have met they wait."""
    for process in processes:
        process.join(timeout=GRACE_S)
        if process.exitcode is None:
            process.kill()
            process.join()


def wait_for_a_save(checkpoints: Path, process: BaseProcess, *, saves: int) -> None:
    """Until so many saves have begun, or the process has ended."""
    seen: set[Path] = set()
    while len(seen) < saves and process.is_alive():
        seen |= {*checkpoints.glob("*.tmp")}
        time.sleep(1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_at_random_moments_is_the_undisturbed_one_to_the_bit(
    folder: Path, kind: str
) -> None:
    ranks, flags = KINDS[kind]
    moments = random.Random(kind)
    whole = f"{kind.replace(' ', '_')}_whole"
    began = time.monotonic()
    assert set(ended(folder, whole, train(folder, whole, ranks, flags))) == {0}
    # the first one also starts the process that all are forked from
    longest = time.monotonic() - began
    kills, in_saves, runs = 0, 0, 0
    while kills < KILLS:
        name = f"{whole}_{runs}"
        run_dir = folder / "runs" / name
        codes: list[int | None] = []
        while not has_summary(run_dir):
            processes = train(folder, name, ranks, flags)
            if kills < KILLS:
                victim = moments.choice(processes)
                if kills % 2:  # a save is a small part of a run: wait until one begins
                    wait_for_a_save(run_dir / "checkpoints", victim, saves=moments.randint(1, 3))
                    time.sleep(moments.uniform(0, LONGEST_SAVE_S))
                else:
                    victim.join(timeout=moments.uniform(0, longest))
                if victim.exitcode is None:
                    victim.kill()
                    kills += 1
                    in_saves += any((run_dir / "checkpoints").glob("*.tmp"))
                    end_as_a_launcher_does(processes)
                    continue
            codes = ended(folder, name, processes)
            assert set(codes) == {0}, (folder / f"{name}.0.log").read_text()
        assert_same(run_dir, folder / "runs" / whole)
        runs += 1
    print(f"{kind}: {kills} kills, {in_saves} of them in saves; {runs} runs, equal to the bit")
    assert in_saves


def test_of_two_starts_at_once_one_trains_and_nothing_of_it_is_lost(folder: Path) -> None:
    ranks, flags = KINDS["image"]
    refused = 0
    for i in range(PAIRS + 1):
        name = f"pair{i}"
        pair = [train(folder, name, ranks, flags)[0] for _ in range(1 if i == 0 else 2)]
        codes = sorted(code or 0 for code in ended(folder, name, pair))
        # the second may come when the first is through
        assert codes in ([0], [0, 2], [0, 0]), (folder / f"{name}.0.log").read_text()
        refused += 2 in codes
        assert_same(folder / "runs" / name, folder / "runs" / "pair0")
    print(f"{PAIRS} pairs, {refused} of them with one refused; all runs equal to the bit")
    assert refused
