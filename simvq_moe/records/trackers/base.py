"""What a tracker is: a kind with a name, which opens a run that takes lines, pictures and sounds.

    @register
    @dataclass(frozen=True)
    class MyTrackerOptions(TrackerOptions):
        \"""A file of numbers.\"""

        kind: Literal["mine"] = "mine"

        def open(self, run: TrackedRun) -> Tracker:
            return MyTracker(run)

`train.trackers: [mine]` then logs to it. A tracker may fail or hang when it likes: see guarded.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from simvq_moe.config.loading import flatten
from simvq_moe.config.registry import Options, family
from simvq_moe.config.schema import Config
from simvq_moe.config.tasks import without_other_tasks
from simvq_moe.records.dead_slots import DeadSlots
from simvq_moe.records.usage_metrics import Layer


@dataclass(frozen=True)
class LoggedLine:
    """What is known at a logged step."""

    step: int
    metrics: Mapping[str, float]
    counts: Sequence[np.ndarray]
    """Draws of each layer's slots in the window that ends here."""
    held_out_counts: Sequence[np.ndarray] | None
    """Likewise over the held-out set, where it was evaluated."""
    dead: DeadSlots
    """How long each slot has gone without a draw; it goes on, so only a tracker that is `at_once`
    may read it."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers need to know it."""

    folder: Path
    layers: Sequence[Layer]
    step: int
    """The step that it goes on from; 0: a new one."""
    config: Config | None = None
    """None: the run is another library's."""
    command: str = ""
    id: str = ""
    """Name that the tracker gives the run; the same after a resume."""

    @property
    def name(self) -> str:
        return self.folder.name if self.config is None else self.config.name

    @property
    def project(self) -> str:
        """Where runs of one user are together."""
        return "" if self.config is None else self.config.train.tracker_project

    @cached_property
    def tags(self) -> dict[str, str]:
        """What runs of a sweep are told apart by: task, arm and seed."""
        if self.config is None:
            return {}
        arm = self.config.arm or self.config.name
        return {"task": self.config.task, "arm": arm, "seed": str(self.config.seed)}

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """The config by dotted keys, without what is other tasks'."""
        if self.config is None:
            return {}
        mine = without_other_tasks(self.config)
        flat = flatten(self.config).items()
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in flat
            if key.split(".")[0] in mine
        }


class Tracker(ABC):
    """A run in a tracker; what it does not draw, it leaves out."""

    @abstractmethod
    def write(self, line: LoggedLine) -> None:
        """The numbers of a logged step."""

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:  # noqa: B027
        """A picture, (height, width, 3) uint8."""

    def sound(  # noqa: B027
        self, name: str, clip: np.ndarray, step: int, sample_rate: int
    ) -> None:
        """A recording, (time,) in [-1, 1]; the rate is in Hz."""

    def text(self, name: str, text: str, step: int) -> None:  # noqa: B027
        """A text, in Markdown."""

    def close(self, *, finished: bool) -> None:  # noqa: B027
        """The run has done its last step, or has stopped before and may be resumed."""


@family(package="simvq_moe.records.trackers", default="tensorboard")
@dataclass(frozen=True)
class TrackerOptions(Options):
    """A place where runs are logged to."""

    package: ClassVar[str] = ""
    """The module that it needs, as it is imported; empty: none beside this package's own."""
    at_once: ClassVar[bool] = False
    """Whether it only writes files of the run's folder, so that each call is made when it comes;
    otherwise calls are made one after another in a thread of their own."""

    @abstractmethod
    def open(self, run: TrackedRun) -> Tracker:
        """Begin the run there, or go on with it by its id; its package is imported here."""
