"""TensorBoard's events in the run's folder, which `simvq-moe dashboard` shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from simvq_moe.config.registry import register
from simvq_moe.records.trackers.base import LoggedLine, TrackedRun, Tracker, TrackerOptions

EVALUATIONS = ".eval"
"""End of the names of events files with evaluations of a finished run."""


@register
@dataclass(frozen=True)
class TensorBoardOptions(TrackerOptions):
    """Events in the run's `tensorboard/`; what is rewound by a resume is dropped."""

    kind: Literal["tensorboard"] = "tensorboard"
    package: ClassVar[str] = "tensorboard"
    at_once: ClassVar[bool] = True

    def open(self, run: TrackedRun) -> Tracker:
        return Events(run)


class Events(Tracker):
    """The events of a run."""

    def __init__(self, run: TrackedRun) -> None:
        from simvq_moe.records.tensorboard import TensorBoard  # a name needs none of it

        self.board = TensorBoard(
            run.folder / "tensorboard",
            run.layers,
            run.step,
            config=run.config,
            command=run.command,
        )

    def write(self, line: LoggedLine) -> None:
        self.board.write(line.step, line.metrics, line.counts, line.held_out_counts, line.dead)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.board.image(name, pixels, step)

    def sound(self, name: str, clip: np.ndarray, step: int, sample_rate: int) -> None:
        self.board.sound(name, clip, step, sample_rate)

    def text(self, name: str, text: str, step: int) -> None:
        self.board.text(name, text, step)

    def close(self, *, finished: bool) -> None:
        self.board.close(finished=finished)


def write_evaluations(folder: Path, step: int, measures: Mapping[str, float]) -> None:
    """Scalars of a finished run, in an events file of their own in place of the one before.

    Args:
        folder: of the run's events; nothing is written where there is none.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    from torch.utils.tensorboard.writer import SummaryWriter

    before = [*folder.glob(f"events.out.tfevents.*{EVALUATIONS}")]
    with SummaryWriter(str(folder), filename_suffix=EVALUATIONS) as writer:
        for name, value in measures.items():
            writer.add_scalar(name, value, step)
    for file in before:
        file.unlink(missing_ok=True)
