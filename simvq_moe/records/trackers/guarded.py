"""Trackers of a run, none of which can stop it, or hold it up for more than seconds.

One that raises an error, falls behind or does not answer in time is named once, in a line, and left
alone from then on: metrics.jsonl has everything.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from queue import Full, Queue
from threading import Event, Thread
from typing import Any

import numpy as np

from simvq_moe.config.registry import as_options, of_kind
from simvq_moe.errors import ConfigError
from simvq_moe.extras import is_installed, not_installed
from simvq_moe.files.regular import printable
from simvq_moe.records.trackers.base import LoggedLine, TrackedRun, Tracker, TrackerOptions

logger = logging.getLogger(__name__)

WAITING = 1_000
"""Calls that wait for a tracker at most."""
SECONDS_TO_BEGIN = 30.0
"""A run waits so long for all its trackers together when it begins; then it goes on."""
SECONDS_TO_END = 5.0
"""A run waits so long for all its trackers together when it ends."""
THREAD = "simvq_moe tracker "
"""Beginning of the names of their threads."""
SHOWN = 200
"""Characters of an error."""
Call = Callable[[Tracker], None]


def check_trackers(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a tracker that there is not, that stands there twice, or whose
    package is not installed."""
    for name in names:
        package = of_kind(TrackerOptions, name, "train.trackers").package
        if names.count(name) > 1:
            raise ConfigError(f"train.trackers {name!r} stands there twice: name it once")
        if package and not is_installed(package):
            raise ConfigError(f"train.trackers {name!r}: {not_installed(package)}, or leave it out")


def left_alone() -> set[Thread]:
    """Threads of trackers that were left alone in this process. What their packages do when Python
    ends may take minutes."""
    return {thread for thread in threading.enumerate() if thread.name.startswith(THREAD)}


class Trackers:
    """Every tracker of a run.

    Args:
        names: kinds of `TrackerOptions`.
        run: as all of them know it.
        ids: of the run in those trackers that have ids.
        logged_until: by name, the last step that a tracker has had before a resume. What comes up
            to there is the same again, and is not logged twice.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: TrackedRun,
        *,
        ids: Mapping[str, str],
        logged_until: Mapping[str, int],
    ) -> None:
        self.guarded = [
            Guarded(
                as_options(TrackerOptions, name, "train.trackers"),
                replace(run, id=ids.get(name, "")),
                logged_until.get(name, 0),
            )
            for name in names
        ]
        end = time.monotonic() + SECONDS_TO_BEGIN
        for one in self.guarded:
            one.open.wait(max(0.0, end - time.monotonic()))

    def write(self, line: LoggedLine) -> None:
        for one in self.guarded:
            one.do(lambda tracker: tracker.write(line), line.step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        for one in self.guarded:
            one.do(lambda tracker: tracker.image(name, pixels, step), step)

    def sound(self, name: str, clip: np.ndarray, step: int, sample_rate: int) -> None:
        for one in self.guarded:
            one.do(lambda tracker: tracker.sound(name, clip, step, sample_rate), step)

    def text(self, name: str, text: str, step: int) -> None:
        for one in self.guarded:
            one.do(lambda tracker: tracker.text(name, text, step), step)

    def close(self, *, finished: bool) -> None:
        end = time.monotonic() + SECONDS_TO_END
        for one in self.guarded:
            one.close(finished=finished)
        for one in self.guarded:
            one.wait_until(end)


class Guarded:
    """One tracker, from its beginning on.

    Args:
        options: its kind.
        run: what it logs.
        logged_until: the last step that it has had before.
    """

    def __init__(self, options: TrackerOptions, run: TrackedRun, logged_until: int) -> None:
        self.name, self.logged_until = options.kind, logged_until
        self.tracker: Tracker | None = None
        self.failed = False
        self.open = Event()
        """It has begun, or failed to."""
        self.calls: Queue[Callable[[], None] | None] = Queue(WAITING)
        self.thread: Thread | None = None
        if not options.at_once:
            # it may hang for ever, and the process ends nevertheless
            self.thread = Thread(target=self._work, name=f"{THREAD}{self.name}", daemon=True)
            self.thread.start()
        self._call(self._open, options, run)

    def do(self, call: Call, step: int) -> None:
        """Let it log something of a step."""
        if step > self.logged_until:
            self._call(self._use, call)

    def close(self, *, finished: bool) -> None:
        self._call(self._use, lambda tracker: tracker.close(finished=finished))
        if self.thread is not None:
            self._put(None)

    def wait_until(self, end: float) -> None:
        """Return once everything is logged, or when the monotonic clock shows `end`."""
        if self.thread is None or self.failed:
            return
        self.thread.join(max(0.0, end - time.monotonic()))
        if self.thread.is_alive():
            self._leave(f"it has not ended within {SECONDS_TO_END:g} s")

    def _open(self, options: TrackerOptions, run: TrackedRun) -> None:
        try:
            self.tracker = options.open(run)
        finally:
            self.open.set()

    def _use(self, call: Call) -> None:
        assert self.tracker is not None
        call(self.tracker)

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        if self.thread is not None:
            self._put(lambda: self._try(function, *args))
        elif not self.failed:
            self._try(function, *args)

    def _put(self, call: Callable[[], None] | None) -> None:
        try:
            if not self.failed:
                self.calls.put_nowait(call)
        except Full:
            self._leave(f"it is {WAITING:,} calls behind")

    def _work(self) -> None:
        # of one that is left alone no call comes, so that its thread stays: see `left_alone`
        while (call := self.calls.get()) is not None:
            if not self.failed:
                call()

    def _try(self, function: Callable[..., None], *args: Any) -> None:
        try:
            function(*args)
        except (Exception, SystemExit) as error:  # a tracker is a help and no need
            reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))
            self._leave(reason if len(reason) <= SHOWN else reason[:SHOWN] + "...")

    def _leave(self, reason: str) -> None:
        if not self.failed:
            self.failed = True
            logger.warning(
                "train.trackers: %s gets no more of this run, whose metrics.jsonl has all: %s",
                self.name,
                reason,
            )
