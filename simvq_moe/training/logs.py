"""What a run leaves behind: metrics.jsonl (the source of truth), usage.npz, TensorBoard, meta.json.

Only rank 0 writes. Going on from a checkpoint drops what was logged after it, so that an
interrupted run leaves the same records as an uninterrupted one.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from simvq_moe.config import Config
from simvq_moe.training.dead_slots import DeadSlots
from simvq_moe.training.measures import Layer
from simvq_moe.training.tensorboard import TensorBoard


class RunLog:
    """The records of one run.

    Args:
        config: the run's; its folder exists.
        layers: the counted layers.
        step: the step that the run goes on from, 0 for a new one.
    """

    def __init__(self, config: Config, layers: Sequence[Layer], step: int) -> None:
        self.run_dir = run_dir = config.run_dir
        self.layers = layers
        self.step, self.steps_to_do = step, config.train.steps
        self.dead = DeadSlots(len(layers))
        self.steps: dict[str, list[int]] = {"": [], "val_": []}
        self.counts: dict[str, list[np.ndarray]] = {"": [], "val_": []}
        self._go_on_from(step)
        self.metrics = (run_dir / "metrics.jsonl").open("a")
        self.tensorboard = TensorBoard(
            run_dir / "tensorboard", layers, step, config, _command(run_dir)
        )

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        counts: Sequence[np.ndarray],
        held_out_counts: Sequence[np.ndarray] | None,
    ) -> None:
        """One line of metrics.jsonl, then TensorBoard; counts are kept for usage.npz."""
        self.metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        self.metrics.flush()
        self.step = step
        self.dead.add(step, counts)
        self._keep("", step, counts)
        if held_out_counts is not None:
            self._keep("val_", step, held_out_counts)
        self.tensorboard.write(step, metrics, counts, held_out_counts, self.dead)

    def write_samples(self, step: int, pixels: np.ndarray) -> None:
        """samples/val_<step>.png and the same picture in TensorBoard; (height, width, 3) uint8."""
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"val_{step:06d}.png")
        self.tensorboard.image("samples", pixels, step)

    def write_sounds(self, step: int, sounds: Mapping[str, np.ndarray], sample_rate: int) -> None:
        """samples/val_<step>/<number>_<name>.wav and the same in TensorBoard.

        Args:
            sounds: by name, each (samples, time) in [-1, 1].
            sample_rate: Hz.
        """
        folder = self.run_dir / "samples" / f"val_{step:06d}"
        folder.mkdir(exist_ok=True, parents=True)
        for name, clips in sounds.items():
            for i, clip in enumerate(clips):
                soundfile.write(folder / f"{i}_{name}.wav", clip, sample_rate)
                self.tensorboard.sound(f"samples/{i}_{name}", clip, step, sample_rate)

    def write_text(self, step: int, text: str) -> None:
        """samples/val_<step>.txt and the same text in TensorBoard."""
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        (folder / f"val_{step:06d}.txt").write_text(text)
        # indented, so that Markdown leaves it as it is
        self.tensorboard.text("samples", textwrap.indent(text, "    "), step)

    def write_pictures(self, step: int, pictures: Mapping[str, np.ndarray], rows: str) -> None:
        """Heat maps in TensorBoard, (height, width, 3) uint8 by name, and what their rows are."""
        for name, pixels in pictures.items():
            self.tensorboard.image(name, pixels, step)
        if pictures:
            self.tensorboard.text("val/moe/rows_of_pictures", rows, step)

    def write_usage(self) -> None:
        """usage.npz: int64 counts [log step, layer, slot], and of the held-out set; zero-padded."""
        arrays = {}
        for which in ("", "val_"):
            arrays[f"{which}steps"] = np.array(self.steps[which], dtype=np.int64)
            slots = max((layer.slots for layer in self.layers), default=0)
            shape = (len(self.steps[which]), len(self.layers), slots)
            arrays[f"{which}counts"] = np.array(self.counts[which], dtype=np.int64).reshape(shape)
        aside = self.run_dir / "usage.tmp.npz"
        np.savez_compressed(aside, **arrays)
        aside.replace(self.run_dir / "usage.npz")

    def write_spectra(self, spectra: Mapping[str, np.ndarray]) -> None:
        """spectra.npz: the maps' singular values at the last evaluation, by number of the bank."""
        if spectra:
            aside = self.run_dir / "spectra.tmp.npz"
            arrays: dict[str, Any] = dict(spectra)
            np.savez(aside, **arrays)
            aside.replace(self.run_dir / "spectra.npz")

    def close(self) -> None:
        self.write_usage()
        self.metrics.close()
        self.tensorboard.close(finished=self.step == self.steps_to_do)

    def _keep(self, which: str, step: int, counts: Sequence[np.ndarray]) -> None:
        slots = max((layer.slots for layer in self.layers), default=0)
        rows = [np.pad(n, (0, slots - len(n))) for n in counts]
        self.steps[which].append(step)
        self.counts[which].append(np.array(rows, dtype=np.int64).reshape(len(rows), slots))

    def _go_on_from(self, step: int) -> None:
        """Drop records after `step`: they are written again, the same."""
        path = self.run_dir / "metrics.jsonl"
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            write_text(path, "".join(f"{line}\n" for line in kept))
        if (self.run_dir / "usage.npz").is_file():
            with np.load(self.run_dir / "usage.npz") as saved:
                for which in ("", "val_"):
                    n = int((saved[f"{which}steps"] <= step).sum())
                    self.steps[which] = saved[f"{which}steps"][:n].tolist()
                    self.counts[which] = list(saved[f"{which}counts"][:n])
            for at, counts in zip(self.steps[""], self.counts[""], strict=True):
                rows = zip(self.layers, counts, strict=True)
                self.dead.add(at, [row[: layer.slots] for layer, row in rows])


def _command(run_dir: Path) -> str:
    """The command that started the run, from its meta.json."""
    meta = run_dir / "meta.json"
    return json.loads(meta.read_text())["command"] if meta.is_file() else ""


def _step_of(line: str) -> float:
    """The step of a line; a torn line belongs to no step that is kept."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file whole."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file whole: a reader never sees half of it."""
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    aside.replace(path)
