"""Fixtures of all tests."""

from __future__ import annotations

import pytest

from simvq_moe.training.engine import World, start_distributed


@pytest.fixture(scope="session")
def world() -> World:
    """This process as the only rank, with DeepSpeed ready."""
    return start_distributed()
