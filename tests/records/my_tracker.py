"""A tracker of a user's own, lines of JSON in the run's folder; and one that fails when told to."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from simvq_moe.config.registry import register
from simvq_moe.records.trackers.base import LoggedLine, TrackedRun, Tracker, TrackerOptions

FAILS_AT = "SIMVQ_MOE_TEST_TRACKER"
"""Variable of the environment: the call at which `failing` fails, or hangs."""


@register
@dataclass(frozen=True)
class LinesOptions(TrackerOptions):
    """Lines of JSON."""

    kind: Literal["lines"] = "lines"

    def open(self, run: TrackedRun) -> Tracker:
        return Lines(run)


class Lines(Tracker):
    def __init__(self, run: TrackedRun) -> None:
        self.file: Path = run.folder / "lines.jsonl"
        about = {"id": run.id, "name": run.name, "project": run.project, "tags": run.tags}
        self.say({**about, "begin": run.step, "parameters": run.parameters})

    def say(self, content: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(content) + "\n")

    def write(self, line: LoggedLine) -> None:
        self.say({"step": line.step, **line.metrics})

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.say({"image": name, "at": step, "shape": pixels.shape})

    def close(self, *, finished: bool) -> None:
        self.say({"finished": finished})


@register
@dataclass(frozen=True)
class FailingOptions(TrackerOptions):
    """Fails or hangs."""

    kind: Literal["failing"] = "failing"

    def open(self, run: TrackedRun) -> Tracker:
        fail("open")
        return Failing(run)


class Failing(Lines):
    def write(self, line: LoggedLine) -> None:
        fail("write")
        super().write(line)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        fail("image")
        super().image(name, pixels, step)

    def close(self, *, finished: bool) -> None:
        fail("close")
        super().close(finished=finished)


def fail(call: str) -> None:
    told = os.environ.get(FAILS_AT, "")
    if told == call:
        raise ConnectionError(f"nobody\nanswers {call}")
    if told == f"{call} hangs":
        time.sleep(60)
