"""Usage live in TensorBoard: an overview, margins over layers, heat maps, histograms, dead slots.

Two levels of detail: tags under at_a_glance/ and the layout's first category show a whole run,
all others show each layer.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard.summary import custom_scalars, hparams
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from simvq_moe.config.loading import defaults_of_every_kind, flatten
from simvq_moe.config.schema import Config
from simvq_moe.config.tasks import without_other_tasks
from simvq_moe.files.yaml import plain_yaml
from simvq_moe.records.catalogue import usage_leaves
from simvq_moe.records.dead_slots import DeadSlots
from simvq_moe.records.tensorboard_layout import AT_A_GLANCE, layout
from simvq_moe.records.usage_metrics import Layer, layer_names
from simvq_moe.records.viridis import viridis

TOP_LOAD = 4.0
"""Load (1 is fair) at which the colour scale ends: the same in every run, so that maps compare."""
CELL = 8
"""Pixels a side of a slot in a heat map."""


class TensorBoard:
    """Writes one run's events and the layout of its custom scalars.

    Args:
        folder: where the events go.
        layers: the counted layers.
        step: events after this step are dropped; the run goes on from there.
        config: shown as text, and as a row of the HParams table; None: there is none.
        command: shown as text.
    """

    def __init__(
        self,
        folder: Path,
        layers: Sequence[Layer],
        step: int,
        *,
        config: Config | None,
        command: str,
    ) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self.layers = layers
        self.roots = layer_names(layers)
        self._file().add_summary(closed_details(layout(layers)))
        self.text("at_a_glance/command", _verbatim(command), step)
        self.finished: Any = None
        if config is None:
            return
        self.text("at_a_glance/config", _verbatim(plain_yaml(without_other_tasks(config))), step)
        row, self.finished = row_of_table(config)
        self._file().add_summary(row)

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        counts: Sequence[np.ndarray],
        held_out_counts: Sequence[np.ndarray] | None,
        dead: DeadSlots,
    ) -> None:
        """Scalars of a logged step, and the counts as margins, heat maps and histograms.

        Args:
            step: the step.
            metrics: by name.
            counts: draws of each layer's slots in the window that ends here.
            held_out_counts: over the held-out set, where it was evaluated.
            dead: how long each slot has gone without a draw.
        """
        scalars = {**metrics, **self._margins(metrics, counts)}
        scalars |= {f"at_a_glance/{name}": metrics[name] for name in metrics.keys() & AT_A_GLANCE}
        # one event for all: each costs as much as many values
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._file().add_summary(Summary(value=values), step)
        if held_out_counts is not None:
            self.text("at_a_glance/dead", dead.table(self.roots, step), step)
        for prefix, found in (("", counts), ("val/", held_out_counts)):
            if found is not None:
                self._heat_maps(prefix, found, step)
                self._histograms(prefix, found, step)
        self.writer.flush()

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """A picture, (height, width, 3) uint8."""
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def sound(self, name: str, clip: np.ndarray, step: int, sample_rate: int) -> None:
        """A recording, (time,) in [-1, 1]; the rate is in Hz."""
        self.writer.add_audio(name, clip[None], step, sample_rate=sample_rate)

    def text(self, name: str, text: str, step: int) -> None:
        self.writer.add_text(name, text, step)

    def close(self, *, finished: bool) -> None:
        if finished and self.finished is not None:
            self._file().add_summary(self.finished)
        self.writer.close()

    def _file(self) -> FileWriter:
        found = self.writer.file_writer
        assert found is not None
        return found

    def _margins(
        self, metrics: Mapping[str, float], counts: Sequence[np.ndarray]
    ) -> dict[str, float]:
        scalars: dict[str, float] = {}
        for root, n in zip(self.roots, counts, strict=True):
            load = loads(n)
            scalars |= {f"{root}/load_min": float(load.min()), f"{root}/load_mean": 1.0}
            scalars[f"{root}/load_max"] = float(load.max())
        counted = [root for root in self.roots if not root.startswith("moe_kept")]
        if not counted:  # a dense model
            return {}
        scalars["at_a_glance/load_min"] = min(scalars[f"{root}/load_min"] for root in counted)
        scalars["at_a_glance/load_mean"] = 1.0
        scalars["at_a_glance/load_max"] = max(scalars[f"{root}/load_max"] for root in counted)
        if len(counted) > 1:
            for m in usage_leaves("detail"):
                values = [metrics[f"{root}/{m}"] for root in counted]
                scalars |= {f"layers/{m}_min": min(values), f"layers/{m}_max": max(values)}
                scalars[f"layers/{m}_mean"] = float(np.mean(values))
        return scalars

    def _heat_maps(self, prefix: str, counts: Sequence[np.ndarray], step: int) -> None:
        by_kind = {
            kind: [
                loads(n) for layer, n in zip(self.layers, counts, strict=True) if layer.kind == kind
            ]
            for kind in ("codes", "experts")
        }
        if by_kind["experts"]:
            self.image(f"{prefix}moe/load", heat_map(np.stack(by_kind["experts"])), step)
        if by_kind["codes"]:
            width = int(np.ceil(np.sqrt(2 * len(by_kind["codes"][0]))))
            # each codebook wraps over rows of its own; the cells after its last code look dead
            grid = np.concatenate(
                [np.pad(load, (0, -len(load) % width)) for load in by_kind["codes"]]
            )
            self.image(f"{prefix}codes/load", heat_map(grid.reshape(-1, width)), step)

    def _histograms(self, prefix: str, counts: Sequence[np.ndarray], step: int) -> None:
        """One bucket a slot; neighbours share one where there are more than 512."""
        for root, n in zip(self.roots, counts, strict=True):
            group = -(-len(n) // 512)
            buckets = np.pad(n, (0, -len(n) % group)).reshape(-1, group).sum(1)
            ids = np.arange(len(n))
            self.writer.add_histogram_raw(
                f"{prefix}{root}/load",
                min=0,
                max=len(n),
                num=int(n.sum()),
                sum=int((n * ids).sum()),
                sum_squares=int((n * ids**2).sum()),
                bucket_limits=(group * (np.arange(len(buckets)) + 1)).tolist(),
                bucket_counts=buckets.tolist(),
                global_step=step,
            )


def loads(counts: np.ndarray) -> np.ndarray:
    """N f of each slot: 1 is its fair share; 0 where nothing was drawn."""
    return len(counts) * counts / max(counts.sum(), 1)


def heat_map(load: np.ndarray, cell: int = CELL) -> np.ndarray:
    """A (rows, columns) array of loads as (height, width, 3) uint8 pixels; `TOP_LOAD` is bright.

    Args:
        cell: pixels a side of a value.
    """
    pixels = viridis(np.clip(load / TOP_LOAD, 0, 1))
    return pixels.repeat(cell, axis=0).repeat(cell, axis=1)


def closed_details(charts: Mapping[str, dict[str, list]]) -> Any:
    """Summary of the layout of custom scalars, where all categories but the first are closed.

    The page sends a request for every chart, pattern and run of an open category: hundreds, where
    18 runs have six layers.
    """
    summary = custom_scalars(charts)
    (packed,) = summary.value[0].tensor.string_val
    kind: Any = layout_pb2  # its names are made when it is imported
    stored = kind.Layout.FromString(packed)
    for category in stored.category[1:]:
        category.closed = True
    summary.value[0].tensor.string_val[:] = [stored.SerializeToString()]
    return summary


def row_of_table(config: Config) -> tuple[Any, Any]:
    """Summaries for the HParams table: this run's values, and that it is finished.

    There is none of columns: TensorBoard would take them from one run for all, and compares the
    rows by itself where it finds none.
    """
    mine = without_other_tasks(config)
    defaults = defaults_of_every_kind(Config())
    values = {key: value for key, value in flatten(config).items() if key.split(".")[0] in mine}
    _, row, end = hparams({key: _cell(value, defaults[key]) for key, value in values.items()}, {})
    return row, end


def _cell(value: Any, default: Any) -> bool | int | float | str:
    """A column has one type: what may be None, or several values, is text."""
    return str(value) if default is None or not isinstance(value, bool | int | float) else value


def _verbatim(text: str) -> str:
    """Indented, so that Markdown leaves it as it is."""
    return textwrap.indent(text, "    ")
