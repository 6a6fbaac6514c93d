"""Which of two ways to one result is faster on this GPU: measured by the first call of a shape, and
again from time to time, because the data decide as well.

The result is the same to the bit either way, so that a choice changes no number of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

AGAIN_AFTER = 1000
"""Calls of a shape from one measurement to the next."""


@dataclass
class _Choice:
    way: int
    calls: int = 0


class FasterWay:
    """Remembers for each key which way took less time.

    Args:
        seconds: what one call of a way takes once it has been called; None measures by the events
            of the GPU, and waits for them.
    """

    def __init__(self, seconds: Callable[[Callable[[], object]], float] | None = None) -> None:
        self._seconds = seconds or _seconds_on_gpu
        self._choices: dict[Hashable, _Choice] = {}

    def __call__(self, key: Hashable, *ways: Callable[[], T]) -> T:
        """The result of the way that is fastest for the key."""
        choice = self._choices.get(key)
        if choice is None or choice.calls >= AGAIN_AFTER:
            times = [self._seconds(way) for way in ways]
            choice = self._choices[key] = _Choice(times.index(min(times)))
        choice.calls += 1
        return ways[choice.way]()


def _seconds_on_gpu(way: Callable[[], object]) -> float:
    """Of the second call: the first one compiles."""
    way()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    way()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
