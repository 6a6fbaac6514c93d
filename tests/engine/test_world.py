"""Ranks of a machine."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from simvq_moe.engine.world import World, share_cores
from tests.launching import on_ranks


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 6),
        ({"LOCAL_SIZE": "1"}, 6),
        ({"LOCAL_SIZE": "2"}, 3),
        ({"LOCAL_WORLD_SIZE": "4"}, 1),
        ({"LOCAL_WORLD_SIZE": "8"}, 1),
        ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "6"}, 6),
    ],
)
def test_ranks_share_the_cores_of_a_machine_unless_told(
    variables: dict[str, str], threads: int
) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        share_cores(variables)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def prepare_slowly(rank: int, folder: Path) -> None:
    """Collective calls give up after 2 seconds, and rank 0 works for 5."""
    store = (folder / "store").as_uri()
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=2)
    )
    world = World(rank, 2, torch.device("cpu"))
    made = folder / "made"

    def work() -> bool:
        if not made.is_file():
            assert world.is_main
            time.sleep(5)
            made.touch()
        return made.is_file()

    assert world.main_first(work)
    assert world.main_first(work)
    dist.destroy_process_group()


def test_ranks_wait_for_a_preparation_that_outlasts_collective_calls(tmp_path: Path) -> None:
    on_ranks(prepare_slowly, tmp_path)
