"""trackio; TRACKIO_DIR, TRACKIO_SPACE_ID and the like mean what they always do."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal

import numpy as np

from simvq_moe.config.registry import register
from simvq_moe.records.trackers.base import LoggedLine, TrackedRun, Tracker, TrackerOptions


@register
@dataclass(frozen=True)
class TrackioOptions(TrackerOptions):
    """trackio; without a Space in its folder of this machine, which `trackio show` shows."""

    kind: Literal["trackio"] = "trackio"
    package: ClassVar[str] = "trackio"

    def open(self, run: TrackedRun) -> Tracker:
        return Trackio(run)


class Trackio(Tracker):
    """A run in the project; it is found again by its name, which so ends with its id."""

    def __init__(self, run: TrackedRun) -> None:
        self.trackio: Any = import_module("trackio")
        self.run = self.trackio.init(
            project=run.project,
            name=f"{run.name.replace('/', '.')}-{run.id[:6]}",
            group=run.name.rpartition("/")[0] or None,
            config={**run.tags, **run.parameters},
            resume="allow",
            embed=False,
        )

    def write(self, line: LoggedLine) -> None:
        # a step and a time of its own it has anyhow, and refuses these names
        self.run.log({k: v for k, v in line.metrics.items() if k != "time"}, step=line.step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.run.log({name: self.trackio.Image(pixels)}, step=step)

    def sound(self, name: str, clip: np.ndarray, step: int, sample_rate: int) -> None:
        self.run.log({name: self.trackio.Audio(clip, sample_rate=sample_rate)}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        self.run.log({f"{name}/text": self.trackio.Markdown(text)}, step=step)

    def close(self, *, finished: bool) -> None:
        del finished
        self.run.finish()
