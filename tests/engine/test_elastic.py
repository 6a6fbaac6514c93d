"""Ranks that torchrun starts again after a death meet, and go on to the same weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore, Store
from torch.testing import assert_close

from simvq_moe.engine.elastic import name_of_start
from simvq_moe.runs import checkpoint
from tests import launching

SOON = timedelta(seconds=30)


def meet(store: Store, ranks: Sequence[int], size: int) -> set[str]:
    """The names that ranks, who come in this order, give their start."""
    with ThreadPoolExecutor(size) as pool:
        return set(pool.map(lambda rank: name_of_start(store, rank, size, SOON), ranks))


def test_each_start_has_one_name_of_its_own_whatever_earlier_ones_left():
    store = HashStore()
    found = [
        meet(store, order, len(order))
        for order in ((0, 1, 2), (2, 1, 0), (1, 0), (0, 3, 1, 2), (0,), (1, 2, 0))
    ]
    assert all(len(names) == 1 for names in found)
    assert len(set.union(*found)) == len(found)


def test_what_a_rank_said_before_it_was_killed_is_not_taken_for_its_successor():
    store = HashStore()
    with pytest.raises(TimeoutError, match="no answer"):
        name_of_start(store, 1, 2, timedelta(0))
    with pytest.raises(TimeoutError, match=r"ranks \[1\] have not come"):
        name_of_start(store, 0, 2, timedelta(seconds=0.1))
    assert len(meet(store, (0, 1), 2)) == 1


@pytest.mark.distributed
def test_a_run_whose_rank_is_killed_goes_on_by_torchrun(tmp_path: Path):
    """One command, which nobody gives again."""
    flags = ("train", "--train.steps", "30", "--train.save_every", "10", "--train.log_every", "5")
    flags += ("--quantizer.codes", "16", "--image_tokenizer.hidden", "4", "--data.image_size", "8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1", "-m", "simvq_moe"]
    process = launching.start_command([*command, *flags, "--name", "killed"], tmp_path)
    killed, whole = tmp_path / "runs" / "killed", tmp_path / "runs" / "whole"
    launching.wait_until(process, (killed / "checkpoints" / "10").exists)
    launching.rank_of(process, 1).kill()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "resuming runs/killed at step" in errors
    undisturbed = launching.run_forked(*flags, "--name", "whole", cwd=tmp_path, ranks=2)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert launching.metrics(killed) == launching.metrics(whole)
    found, wanted = (checkpoint.load_weights(run / "checkpoints" / "30") for run in (killed, whole))
    assert_close(found, wanted, rtol=0, atol=0)
