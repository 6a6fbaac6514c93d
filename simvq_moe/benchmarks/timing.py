"""Time and memory of steps side by side, in one process.

Rounds are interleaved, so that a busy machine slows all alike, and the best round counts. Time is
CPU seconds of the process (wall time on a GPU), memory the largest sum of live tensor allocations.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Step = Callable[[], object]


def best_of_rounds(steps: Mapping[str, Step], rounds: int, device: str) -> dict[str, float]:
    """Seconds of each step in its best round; one more round first warms up caches and pools."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds + 1):
        for name, step in steps.items():
            best[name] = min(best[name], seconds(step, device))
    return best


def seconds(step: Step, device: str) -> float:
    """CPU seconds of the process, on a GPU wall time until it has finished."""
    if device != "cpu":
        return wall_seconds(step, device)
    start = time.process_time()
    step()
    return time.process_time() - start


def wall_seconds(step: Step, device: str, times: int = 1) -> float:
    """Wall seconds of a step until it has finished, the mean of several in a row."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        step()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def megabytes(step: Step, device: str) -> float:
    """Largest sum of tensor allocations within the step that are alive at once."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with _quiet_stderr(), torch.profiler.profile(profile_memory=True) as profile:
        step()
    results: Any = profile.profiler
    alive = peak = 0
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak / 1e6


def installed(name: str) -> Any:
    """The module, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's own C++ code writes to standard error; Python's redirection can't catch it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
