"""Shapes and types are checked at run time in all tests; fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook


def modules_with_shapes() -> list[str]:
    """Names of the modules whose annotations have shapes. In others, whose types pyright knows, the
    check of each call would take most of the time of the tests."""
    root = Path(__file__).parents[1]
    files = (root / "simvq_moe").rglob("*.py")
    return [
        ".".join(file.relative_to(root).with_suffix("").parts)
        for file in files
        if "\nfrom jaxtyping import" in file.read_text()
    ]


install_import_hook(modules_with_shapes(), "beartype.beartype")

from simvq_moe.engine.world import World, start_distributed  # noqa: E402
from tests.shape_checks import without_shape_checks  # noqa: E402
from tests.two_ranks import TwoRanks  # noqa: E402


@pytest.fixture(scope="session")
def world() -> World:
    """This process as the only rank, with DeepSpeed ready."""
    torch.set_num_threads(1)  # as in the processes that tests start, for equal bits
    return start_distributed()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without checks of shapes."""
    with without_shape_checks():
        yield


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    """Two ranks that take work. ZeRO's stage 3 is not for them: it changes torch itself."""
    ranks = TwoRanks(tmp_path_factory.mktemp("two_ranks"))
    yield ranks
    ranks.close()
