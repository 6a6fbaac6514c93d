"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from simvq_moe.engine.world import World, start_distributed
from tests.two_ranks import TwoRanks


@pytest.fixture(scope="session")
def world() -> World:
    """This process as the only rank, with DeepSpeed ready."""
    torch.set_num_threads(1)  # as in the processes that tests start, for equal bits
    return start_distributed()


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    """Two ranks that take work. ZeRO's stage 3 is not for them: it changes torch itself."""
    ranks = TwoRanks(tmp_path_factory.mktemp("two_ranks"))
    yield ranks
    ranks.close()
