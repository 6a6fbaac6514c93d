"""Weights & Biases; WANDB_MODE, WANDB_BASE_URL and the like mean what they always do."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal

import numpy as np

from simvq_moe.config.registry import register
from simvq_moe.records.trackers.base import LoggedLine, TrackedRun, Tracker, TrackerOptions

TAG = 64
"""Characters of a tag."""
SECONDS_TO_UPLOAD = 4.0
"""Seconds an upload has at the end of a run, fewer than the run waits for its trackers."""


@register
@dataclass(frozen=True)
class WandbOptions(TrackerOptions):
    """Weights & Biases; without a network with WANDB_MODE=offline, into the run's `wandb/`."""

    kind: Literal["wandb"] = "wandb"
    package: ClassVar[str] = "wandb"

    def open(self, run: TrackedRun) -> Tracker:
        return Wandb(run)


class Wandb(Tracker):
    """A run in the project, in a group with the other seeds of its arm."""

    def __init__(self, run: TrackedRun) -> None:
        self.wandb: Any = import_module("wandb")
        settings = self.wandb.Settings(
            console="off", silent=True, finish_timeout=SECONDS_TO_UPLOAD, finish_timeout_raises=True
        )
        if self.wandb.setup().settings.mode == "online" and not self.wandb.login(prompt=False):
            raise RuntimeError("nobody is logged in: wandb login, or WANDB_MODE=offline")
        self.run = self.wandb.init(
            project=run.project,
            id=run.id,
            resume="allow",
            name=run.name,
            group=run.name.rpartition("/")[0] or None,
            tags=[f"{name}:{value}"[:TAG] for name, value in run.tags.items()],
            config=run.parameters,
            dir=run.folder,
            settings=settings,
            reinit="create_new",
            allow_val_change=True,
        )

    def write(self, line: LoggedLine) -> None:
        self.run.log(dict(line.metrics), step=line.step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.run.log({name: self.wandb.Image(pixels)}, step=step)

    def sound(self, name: str, clip: np.ndarray, step: int, sample_rate: int) -> None:
        self.run.log({name: self.wandb.Audio(clip, sample_rate=sample_rate)}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        table = self.wandb.Table(columns=["text"], data=[[text]])
        self.run.log({f"{name}/text": table}, step=step)

    def close(self, *, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)
