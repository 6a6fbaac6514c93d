"""Usage live in TensorBoard: margins over layers, layer x expert heat maps, load histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from torch.utils.tensorboard.writer import SummaryWriter

from simvq_moe.core.usage import usage
from simvq_moe.training.measures import Layer, layer_names

TOP_LOAD = 4.0
"""Load (1 is fair) at which the colour scale ends: the same in every run, so that maps compare."""
CELL = 8
"""Pixels a side of a slot in a heat map."""
MARGIN_MEASURES = ("used", "perplexity", "entropy", "gini", "max_vio")
PROBE_MEASURES = (
    *("fluctuation", "router_entropy", "confidence", "boundary_margin", "importance_cv2"),
    *("co_activation", "domain_information", "token_information", "output_similarity"),
)
"""Router measures on the probe that have a chart."""


class TensorBoard:
    """Writes one run's events and the layout of its custom scalars.

    Args:
        folder: where the events go.
        layers: the counted layers.
        step: events after this step are dropped; the run goes on from there.
    """

    def __init__(self, folder: Path, layers: Sequence[Layer], step: int) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self.layers = layers
        self.roots = layer_names(layers)
        self.writer.add_custom_scalars(layout(layers))

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        counts: Sequence[np.ndarray],
        held_out_counts: Sequence[np.ndarray] | None,
    ) -> None:
        """Scalars of a logged step, and the counts as margins, heat maps and histograms."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        for root, load in self._margins(counts).items():
            self.writer.add_scalar(root, load, step)
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

    def close(self) -> None:
        self.writer.close()

    def _margins(self, counts: Sequence[np.ndarray]) -> dict[str, float]:
        scalars: dict[str, float] = {}
        for root, n in zip(self.roots, counts, strict=True):
            load = loads(n)
            scalars |= {f"{root}/load_min": float(load.min()), f"{root}/load_mean": 1.0}
            scalars[f"{root}/load_max"] = float(load.max())
        measured = [
            usage(n).as_dict()
            for layer, n in zip(self.layers, counts, strict=True)
            if layer.kind != "kept"
        ]
        if len(measured) > 1:
            for m in MARGIN_MEASURES:
                values = [one[m] for one in measured]
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
    """N f of each slot: 1 is its fair share."""
    return len(counts) * counts / counts.sum()


def heat_map(load: np.ndarray, cell: int = CELL) -> np.ndarray:
    """A (rows, columns) array of loads as (height, width, 3) uint8 pixels; `TOP_LOAD` is bright.

    Args:
        cell: pixels a side of a value.
    """
    colours = matplotlib.colormaps["viridis"](np.clip(load / TOP_LOAD, 0, 1))[..., :3]
    pixels = (255 * colours).round().astype(np.uint8)
    return pixels.repeat(cell, axis=0).repeat(cell, axis=1)


def layout(layers: Sequence[Layer]) -> dict[str, dict[str, list]]:
    """Custom-scalars charts: margins min-mean-max of the load in each layer, and over layers."""
    charts: dict[str, dict[str, list]] = {}
    if len(layers) > 1:
        charts["usage over layers"] = {
            m: ["Margin", [f"layers/{m}_{end}" for end in ("mean", "min", "max")]]
            for m in MARGIN_MEASURES
        }
    if layers:
        charts["load of each layer (1 is fair)"] = {
            root: ["Margin", [f"{root}/load_{end}" for end in ("mean", "min", "max")]]
            for root in layer_names(layers)
        }
    if any(layer.kind == "codes" for layer in layers):
        names = ("used", "perplexity", "entropy", "gini")
        charts["codes"] = {
            m: ["Multiline", [f"^codes/(mean/)?{m}$", f"^val/codes/(mean/)?{m}$"]] for m in names
        }
    if any(layer.kind == "experts" for layer in layers):
        charts["routers on the probe, each layer"] = {
            m: ["Multiline", [rf"^val/moe/(\d+|mean)/{m}$"]] for m in PROBE_MEASURES
        }
    charts["loss"] = {"training and held out": ["Multiline", ["^train/loss$", "^val/loss$"]]}
    return charts
