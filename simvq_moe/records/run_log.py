"""What a run leaves behind: metrics.jsonl (the source of truth), usage.npz, trackers, meta.json.

Only rank 0 writes. Going on from a checkpoint drops what was logged after it, so that an
interrupted run leaves the same records as an uninterrupted one.
"""

from __future__ import annotations

import json
import logging
import textwrap
import time
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from simvq_moe.config.schema import Config, TrainConfig
from simvq_moe.files.of_runs import META, METRICS, SPECTRA, USAGE
from simvq_moe.files.regular import (
    BrokenFileError,
    open_regular,
    read_json,
    sync,
    validate_json,
    write_atomically,
    written_whole,
)
from simvq_moe.records.counted_windows import CountedWindows
from simvq_moe.records.dead_slots import DeadSlots
from simvq_moe.records.trackers.base import LoggedLine, TrackedRun
from simvq_moe.records.trackers.guarded import Trackers
from simvq_moe.records.usage_metrics import Layer

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_COUNTS, SHARE_OF_COUNTS = 15.0, 0.01
"""usage.npz is written anew after so many seconds, for those who look on, unless that would take a
larger share of the time; and with every checkpoint."""


@dataclass(frozen=True)
class _Meta:
    """What is read of meta.json."""

    command: str = ""


@dataclass(frozen=True)
class _Line:
    """What is read of a line of metrics.jsonl."""

    step: float


class RunLog:
    """The records of one run.

    Args:
        run_dir: its folder, which exists.
        layers: the counted layers.
        step: the step that the run goes on from, 0 for a new one.
        steps: those of the whole run.
        config: says where else the run is logged to; None: the run is another library's, and is
            logged to TensorBoard.
        tracker_ids: of the run in trackers that have ids.
        known: trackers that have had what metrics.jsonl holds so far.
    """

    def __init__(
        self,
        run_dir: Path,
        layers: Sequence[Layer],
        step: int,
        *,
        steps: int,
        config: Config | None = None,
        tracker_ids: Mapping[str, str] | None = None,
        known: Collection[str] = (),
    ) -> None:
        self.run_dir = run_dir
        self.layers = layers
        self.step, self.steps_to_do = step, steps
        self.dead = DeadSlots(len(layers))
        slots = max((layer.slots for layer in layers), default=0)
        self.windows = {which: CountedWindows(len(layers), slots) for which in ("", "val_")}
        self.next_counts = time.monotonic() + SECONDS_BETWEEN_COUNTS
        logged_until = self._go_on_from(step)
        self.metrics = (run_dir / METRICS).open("a")
        self.trackers = Trackers(
            TrainConfig().trackers if config is None else config.train.trackers,
            TrackedRun(run_dir, layers, step, config, _command(run_dir)),
            ids=tracker_ids or {},
            logged_until=dict.fromkeys(known, logged_until),
        )

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        counts: Sequence[np.ndarray],
        held_out_counts: Sequence[np.ndarray] | None,
    ) -> None:
        """One line of metrics.jsonl, then of the trackers; counts are kept for usage.npz, which is
        written now and then."""
        self.metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        self.metrics.flush()
        self.step = step
        self.dead.add(step, counts)
        self.windows[""].add(step, counts)
        if held_out_counts is not None:
            self.windows["val_"].add(step, held_out_counts)
        self.trackers.write(LoggedLine(step, metrics, counts, held_out_counts, self.dead))
        if time.monotonic() > self.next_counts:
            self.write_usage()

    def write_samples(self, step: int, pixels: np.ndarray) -> None:
        """samples/val_<step>.png and the same picture in trackers; (height, width, 3) uint8."""
        from PIL import Image  # only runs over images need it

        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        with written_whole(folder / f"val_{step:06d}.png") as aside:
            Image.fromarray(pixels).save(aside)
        self.trackers.image("samples", pixels, step)

    def write_sounds(self, step: int, sounds: Mapping[str, np.ndarray], sample_rate: int) -> None:
        """samples/val_<step>/<number>_<name>.wav and the same in trackers.

        Args:
            sounds: by name, each (samples, time) in [-1, 1].
            sample_rate: Hz.
        """
        import soundfile  # only runs over recordings need it

        folder = self.run_dir / "samples" / f"val_{step:06d}"
        folder.mkdir(exist_ok=True, parents=True)
        for name, clips in sounds.items():
            for i, clip in enumerate(clips):
                with written_whole(folder / f"{i}_{name}.wav") as aside:
                    soundfile.write(aside, clip, sample_rate)
                self.trackers.sound(f"samples/{i}_{name}", clip, step, sample_rate)

    def write_text(self, step: int, text: str) -> None:
        """samples/val_<step>.txt and the same text in trackers."""

        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"val_{step:06d}.txt", text)
        # indented, so that Markdown leaves it as it is
        self.trackers.text("samples", textwrap.indent(text, "    "), step)

    def write_pictures(self, step: int, pictures: Mapping[str, np.ndarray], rows: str) -> None:
        """Heat maps in trackers, (height, width, 3) uint8 by name, and what their rows are."""
        for name, pixels in pictures.items():
            self.trackers.image(name, pixels, step)
        if pictures:
            self.trackers.text("val/moe/rows_of_pictures", rows, step)

    def write_usage(self) -> None:
        """usage.npz: int64 counts [log step, layer, slot], and of the held-out set; zero-padded."""
        began = time.monotonic()
        with (
            written_whole(self.run_dir / USAGE) as aside,
            zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for which, windows in self.windows.items():
                windows.write(archive, which)
        # what a checkpoint's run goes on from is as safe as the checkpoint
        if not self.metrics.closed:
            sync(self.metrics.fileno())
        ended = time.monotonic()
        self.next_counts = ended + max(SECONDS_BETWEEN_COUNTS, (ended - began) / SHARE_OF_COUNTS)

    def write_spectra(self, spectra: Mapping[str, np.ndarray]) -> None:
        """spectra.npz: the maps' singular values at the last evaluation, by number of the bank."""
        if spectra:
            arrays: dict[str, Any] = dict(spectra)
            with written_whole(self.run_dir / SPECTRA) as aside:
                np.savez(aside, **arrays)

    def close(self) -> None:
        self.write_usage()
        self.metrics.close()
        self.trackers.close(finished=self.step == self.steps_to_do)

    def _go_on_from(self, step: int) -> int:
        """Drop records after `step`: they are written again, the same. The last step so far."""
        path = self.run_dir / METRICS
        last = 0.0
        if path.is_file():
            with open_regular(path) as lines, written_whole(path) as aside, aside.open("wb") as new:
                for line in lines:
                    at = _step_of(line)
                    last = max(last, at if isfinite(at) else 0)
                    if at <= step:
                        new.write(line.rstrip() + b"\n")
        if step and (self.run_dir / USAGE).is_file():
            self._take_up_usage(step)
        return int(last)

    def _take_up_usage(self, step: int) -> None:
        try:
            for which, windows in self.windows.items():
                for at, counts in windows.take_up(self.run_dir / USAGE, which, step):
                    if not which:
                        rows = zip(self.layers, counts, strict=True)
                        self.dead.add(at, [row[: layer.slots] for layer, row in rows])
        except BrokenFileError as error:
            logger.warning("%s: counts of steps up to %d are lost from it", error, step)


def _command(run_dir: Path) -> str:
    """The command that started the run, from its meta.json."""
    try:
        return read_json(run_dir / META, _Meta).command
    except BrokenFileError:
        return ""


def _step_of(line: bytes) -> float:
    """The step of a line; a torn line belongs to no step that is kept."""
    try:
        return validate_json(line, _Line, METRICS).step
    except BrokenFileError:
        return float("inf")
