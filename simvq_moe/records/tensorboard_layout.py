"""Which charts TensorBoard draws: an overview of a few, then every layer and measure."""

from __future__ import annotations

from collections.abc import Sequence

from simvq_moe.records.catalogue import WHOLE, names, router_leaves, usage_leaves
from simvq_moe.records.usage_metrics import Layer, layer_names

AT_A_GLANCE = frozenset(
    [*names("overview"), *(f"{where}/{m}" for where in WHOLE for m in usage_leaves("overview"))]
)
"""Metrics that are also written under at_a_glance/."""


def layout(layers: Sequence[Layer]) -> dict[str, dict[str, list]]:
    """Custom-scalars charts by category: an overview, margins min-mean-max of the load in each
    layer and of measures over layers, the probe, the losses."""
    charts: dict[str, dict[str, list]] = {
        "at a glance": {
            "loss, in training and held out": ["Multiline", ["^at_a_glance/(train|val)/loss$"]]
        }
    }
    if layers:
        where = f"^at_a_glance/({'|'.join(WHOLE)})"
        charts["at a glance"] |= {
            m: ["Multiline", [f"{where}/{m}$"]] for m in usage_leaves("overview")
        }
        charts["at a glance"]["load, over all layers (1 is fair)"] = _margin("at_a_glance/load")
    if len(layers) > 1:
        charts["detail: usage over layers"] = {
            m: _margin(f"layers/{m}") for m in usage_leaves("detail")
        }
    if layers:
        charts["detail: load of each layer (1 is fair)"] = {
            root: _margin(f"{root}/load") for root in layer_names(layers)
        }
    if any(layer.kind == "codes" for layer in layers):
        charts["detail: codes"] = {
            m: ["Multiline", [f"^(val/)?codes/(mean/)?{m}$"]] for m in usage_leaves("detail")
        }
    if any(layer.kind == "experts" for layer in layers):
        charts["detail: routers on the probe, each layer"] = {
            m: ["Multiline", [rf"^val/moe/(\d+|mean)/{m}$"]] for m in router_leaves("detail")
        }
    return charts


def _margin(name: str) -> list:
    return ["Margin", [f"{name}_{end}" for end in ("mean", "min", "max")]]
