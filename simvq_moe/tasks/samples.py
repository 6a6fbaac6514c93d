"""What a model makes of held-out samples, to look at, to listen to and to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from simvq_moe.records.run_log import RunLog

SHOWN = 8
"""Held-out samples that are shown."""


@dataclass(frozen=True)
class Samples:
    """The samples of a task at one step."""

    text: str | None = None
    picture: np.ndarray | None = None
    """(height, width, 3) uint8."""
    sounds: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Sounds by name, each (samples, time) in [-1, 1]."""
    sample_rate: int = 0
    """Values of a sound a second."""

    def write(self, log: RunLog, step: int) -> None:
        if self.text is not None:
            log.write_text(step, self.text)
        if self.picture is not None:
            log.write_samples(step, self.picture)
        if self.sounds:
            log.write_sounds(step, dict(self.sounds), self.sample_rate)


def evenly_spread(length: int, number: int) -> np.ndarray:
    """Indices of so many samples of a set, or of all that it has."""
    shown = min(number, length)
    return np.arange(shown) * (length // shown)
