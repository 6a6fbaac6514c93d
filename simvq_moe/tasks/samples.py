"""What a model makes of held-out samples, to look at and to listen to."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from simvq_moe.engine.sharding import ready
from simvq_moe.records.run_log import RunLog
from simvq_moe.tasks.build import SAMPLES, Task


class Samples(NamedTuple):
    """Those of a task, at one step."""

    text: str | None
    picture: np.ndarray | None
    sounds: dict[str, np.ndarray] | None

    def write(self, log: RunLog, step: int, sample_rate: int) -> None:
        if self.text is not None:
            log.write_text(step, self.text)
        if self.picture is not None:
            log.write_samples(step, self.picture)
        if self.sounds is not None:
            log.write_sounds(step, self.sounds, sample_rate)


@torch.no_grad()
def make_samples(task: Task, step: int, device: torch.device) -> Samples:
    """On every rank, for they may share experts or parameters."""
    text = picture = sounds = None
    if task.continuations is not None:
        with ready(task.model):
            text = task.continuations(step)
    if task.picture is not None or task.sounds is not None:
        task.model.eval()
        shown = min(SAMPLES, len(task.held_out))
        every = len(task.held_out) // shown
        batch = task.held_out.batch(np.arange(shown) * every).to(device)
        picture = None if task.picture is None else task.picture(batch)
        sounds = None if task.sounds is None else task.sounds(batch)
    return Samples(text, picture, sounds)
