"""Ranks of a machine."""

from __future__ import annotations

import pytest
import torch

from simvq_moe.engine.world import share_cores


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
