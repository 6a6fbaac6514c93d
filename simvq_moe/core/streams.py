"""Random streams that keep paired arms paired.

Two arms of a comparison start from the same weights wherever their shapes agree. A part whose
shape differs between arms draws from a stream of its own, so that the rest draws the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_stream() -> Iterator[None]:
    """Random numbers drawn inside leave those drawn after it unchanged, however many they are."""
    seed = int(torch.randint(2**62, (), device="cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
