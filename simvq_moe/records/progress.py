"""The one line that tells how far a run is, and how long it still takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from simvq_moe.records.catalogue import briefly

SECONDS_BETWEEN_LINES = 2.0
"""Where lines can't be overwritten, as in a log, they are this far apart."""


class Progress:
    """Prints step, percentage, loss, used, MaxVio, tokens/s and time left on standard error.

    Args:
        steps: the last step.
        start: the step that this process starts from; what was done before is no measure of speed.
    """

    def __init__(self, steps: int, start: int) -> None:
        self.steps, self.start = steps, start
        self.began = time.monotonic()
        self.printed = float("-inf")
        self.overwrite = sys.stderr.isatty()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the line for this step, unless one was printed just now."""
        now = time.monotonic()
        last = step >= self.steps
        if not self.overwrite and now - self.printed < SECONDS_BETWEEN_LINES and not last:
            return
        self.printed = now
        left = (now - self.began) / max(1, step - self.start) * (self.steps - step)
        line = f"{describe(step, self.steps, metrics)}  ETA {duration(left)}"
        if self.overwrite:
            sys.stderr.write(f"\r\033[K{line}{chr(10) if last else ''}")
        else:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def describe(step: int, steps: int, metrics: Mapping[str, float]) -> str:
    """The line without the time left."""
    told = [one.brief.format(metrics[name]) for one, name in briefly() if name in metrics]
    return "  ".join([f"step {step}/{steps}", f"{100 * step / steps:.0f}%", *told])


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
