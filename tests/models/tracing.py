"""What tests of compiled models need: functions without checks of their annotations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters as dynamo_counters

from tests.shape_checks import without_shape_checks

of_tracing = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning",
    "ignore:.*Function'> should not be instantiated:DeprecationWarning",
)
"""Warnings of torch 2.13 while it traces."""


@pytest.fixture
def untyped() -> Iterator[None]:
    """torch.compile can't trace the checks of annotations that the other tests are run under."""
    torch.compiler.reset()
    dynamo_counters.clear()
    with without_shape_checks():
        yield
