"""Where the time of a step goes: data, forward, backward, optimizer and communication.

Phases split a step without overlap: what runs inside another phase is taken off that one, so that
the seconds of all add up to what was measured. On a CPU the clock is read, on a GPU events are
recorded in its stream, so nothing waits; both cost microseconds. On a GPU a phase is therefore the
time of the device and not of the launches, and data that are ready before the device is take none.

Communication is what blocks in a collective of `torch.distributed`: DeepSpeed's reductions and
gathers, the all-to-all between experts, and the agreement of ranks at the end of a step. A rank
that is early waits there for the others, which counts as well.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch.profiler import record_function

from simvq_moe.config.checks import PROFILED_STEPS

Phase = Literal["data", "forward", "backward", "optimizer", "communication"]
PHASES: tuple[Phase, ...] = get_args(Phase)
COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "all_to_all_single", "all_gather"),
    *("all_gather_into_tensor", "reduce_scatter_tensor"),
)
"""Functions of torch.distributed that steps call."""
SKIPPED, WARM_UP, TRACED = 2, 1, PROFILED_STEPS - 3
"""Steps that the profiler leaves out, warms up in, and traces."""


class Phases:
    """Seconds of each phase since they were last taken.

    Args:
        device: whose time it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.open: list[Phase] = []
        self.last: Any = None
        self.spans: list[tuple[Phase, Any, Any]] = []
        """Phases between two events of a GPU, which may not have happened yet."""
        self.seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What runs inside belongs to this phase, also in a profiler's trace."""
        self._mark()
        self.open.append(name)
        try:
            with record_function(name):
                yield
        finally:
            self._mark()
            self.open.pop()

    @contextlib.contextmanager
    def collectives_timed(self) -> Iterator[None]:
        """Inside, every collective within a phase is communication."""
        with exchanged(self._timed):
            yield

    def take(self) -> dict[str, float]:
        """Seconds of each phase, to start again from 0; on a GPU it waits for the last event."""
        if self.spans:
            self.spans[-1][2].synchronize()
        for name, start, end in self.spans:
            self.seconds[name] += start.elapsed_time(end) / 1e3
        taken = {str(name): seconds for name, seconds in self.seconds.items()}
        self.spans, self.seconds = [], dict.fromkeys(PHASES, 0.0)
        return taken

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.open:
                return function(*args, **kwargs)
            with self.phase("communication"):
                return function(*args, **kwargs)

        return call

    def _mark(self) -> None:
        """Credit what went by since the last mark to the innermost open phase."""
        now: Any
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        if self.open and self.cuda:
            self.spans.append((self.open[-1], self.last, now))
        elif self.open:
            self.seconds[self.open[-1]] += now - self.last
        self.last = now


@contextlib.contextmanager
def exchanged(other: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside, every collective is what `other` makes of it.

    The names in torch.distributed are exchanged, and the two functions that DeepSpeed's backend has
    taken from there: that is where its calls and ours meet.
    """
    from deepspeed.comm import comm

    places: list[tuple[Any, str]] = [(dist, name) for name in COLLECTIVES]
    places += [(comm.cdb, f"{name}_function") for name in ("all_gather", "reduce_scatter")]
    before = [(owner, name, getattr(owner, name)) for owner, name in places]
    try:
        for owner, name, function in before:
            setattr(owner, name, other(function))
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


@contextlib.contextmanager
def profiled(folder: Path | None) -> Iterator[Callable[[], None]]:
    """What to call after every step, so that a few of them are traced; no folder: none is.

    The trace in the folder, `*.pt.trace.json.gz`, opens in TensorBoard (torch-tb-profiler) and in
    Perfetto; phases are spans by their names. One line on standard error says where it is.
    """
    if folder is None:
        yield lambda: None
        return
    write = torch.profiler.tensorboard_trace_handler(
        str(folder), worker_name="rank0", use_gzip=True
    )

    def on_trace_ready(profile: torch.profiler.profile) -> None:
        write(profile)
        print(f"profile of {TRACED} steps: {folder}, for ui.perfetto.dev", file=sys.stderr)

    schedule = torch.profiler.schedule(wait=SKIPPED, warmup=WARM_UP, active=TRACED, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=on_trace_ready) as profiler:
        yield profiler.step
