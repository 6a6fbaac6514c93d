"""Metrics by name: usage of every counted layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simvq_moe.core.usage import Kind, UsageCounter, usage

ROOT: dict[Kind, str] = {"codes": "codes", "experts": "moe", "kept": "moe_kept"}
"""Metric prefix of each kind of layer."""


@dataclass(frozen=True)
class Layer:
    """One counted layer of a model."""

    kind: Kind
    slots: int
    top_k: int
    """Draws of a token."""


def layers_of(counters: Sequence[UsageCounter]) -> list[Layer]:
    """The layers that counters count, in their order."""
    return [Layer(c.kind, c.slots, c.top_k) for c in counters]


def layer_names(layers: Sequence[Layer]) -> list[str]:
    """Metric prefix of each layer, numbered within its kind; a single codebook has no number."""
    seen: dict[Kind, int] = dict.fromkeys(ROOT, 0)
    alone = sum(layer.kind == "codes" for layer in layers) == 1
    names = []
    for layer in layers:
        number = "" if layer.kind == "codes" and alone else f"/{seen[layer.kind]:02d}"
        names.append(ROOT[layer.kind] + number)
        seen[layer.kind] += 1
    return names


def usage_metrics(
    layers: Sequence[Layer], counts: Sequence[np.ndarray], prefix: str = ""
) -> dict[str, float]:
    """Measures of each layer's counts, the mean over layers of a kind, the window in tokens. A
    layer that nothing went through has none."""
    metrics: dict[str, float] = {}
    names = layer_names(layers)
    measured = {i: usage(n).as_dict() for i, n in enumerate(counts) if n.any()}
    for i, one in measured.items():
        metrics |= {f"{prefix}{names[i]}/{m}": value for m, value in one.items()}
    for kind, root in ROOT.items():
        of_kind = [i for i in measured if layers[i].kind == kind]
        if not of_kind:
            continue
        first = of_kind[0]
        metrics[f"{prefix}{root}/window_tokens"] = float(counts[first].sum() / layers[first].top_k)
        if names[first] != root:
            for m in measured[first]:
                metrics[f"{prefix}{root}/mean/{m}"] = float(
                    np.mean([measured[i][m] for i in of_kind])
                )
    return metrics | _dropped(layers, counts, prefix)


def _dropped(
    layers: Sequence[Layer], counts: Sequence[np.ndarray], prefix: str
) -> dict[str, float]:
    """Share of assignments that the capacity dropped, in each layer and overall (GShard)."""
    chosen, kept = (
        [float(n.sum()) for layer, n in zip(layers, counts, strict=True) if layer.kind == kind]
        for kind in ("experts", "kept")
    )
    if not any(chosen) or not kept:
        return {}
    shares = {
        f"{prefix}moe/{i:02d}/dropped": 1 - after / before
        for i, (before, after) in enumerate(zip(chosen, kept, strict=True))
        if before
    }
    return shares | {f"{prefix}moe/mean/dropped": 1 - sum(kept) / sum(chosen)}
