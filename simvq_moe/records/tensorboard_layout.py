"""Which charts TensorBoard draws: an overview of a few, then every layer and measure."""

from __future__ import annotations

from collections.abc import Sequence

from simvq_moe.records.usage_metrics import Layer, layer_names

MARGIN_MEASURES = ("used", "perplexity", "entropy", "gini", "max_vio")
PROBE_MEASURES = (
    *("fluctuation", "router_entropy", "confidence", "boundary_margin", "importance_cv2"),
    *("co_activation", "domain_information", "token_information", "output_similarity"),
    *("input_rank", "input_condition", "input_mean_share", "logits_rank", "row_exponent"),
)
"""Router measures on the probe that have a chart."""
ERRORS = (
    *("train/loss", "val/loss", "val/bits_per_byte", "val/mse", "val/psnr", "val/ssim"),
    *("val/mel_distance", "val/si_sdr"),
)
WHERE = ("codes", "codes/mean", "moe/mean")
"""Where the usage of a whole model stands."""
USAGE = ("used", "perplexity", "gini", "max_vio")
AT_A_GLANCE = frozenset(
    [*ERRORS, *(f"{where}/{m}" for where in WHERE for m in USAGE), "speed/tokens_per_s"]
)
"""Metrics that are also written under at_a_glance/."""


def layout(layers: Sequence[Layer]) -> dict[str, dict[str, list]]:
    """Custom-scalars charts by category: an overview, margins min-mean-max of the load in each
    layer and of measures over layers, the probe, the losses."""
    charts: dict[str, dict[str, list]] = {
        "at a glance": {
            "loss, in training and held out": [
                "Multiline",
                ["^at_a_glance/train/loss$", "^at_a_glance/val/loss$"],
            ]
        }
    }
    if layers:
        where = f"^at_a_glance/({'|'.join(WHERE)})"
        charts["at a glance"] |= {m: ["Multiline", [f"{where}/{m}$"]] for m in USAGE}
        charts["at a glance"]["load, over all layers (1 is fair)"] = _margin("at_a_glance/load")
    if len(layers) > 1:
        charts["detail: usage over layers"] = {m: _margin(f"layers/{m}") for m in MARGIN_MEASURES}
    if layers:
        charts["detail: load of each layer (1 is fair)"] = {
            root: _margin(f"{root}/load") for root in layer_names(layers)
        }
    if any(layer.kind == "codes" for layer in layers):
        names = ("used", "perplexity", "entropy", "gini")
        charts["detail: codes"] = {
            m: ["Multiline", [f"^codes/(mean/)?{m}$", f"^val/codes/(mean/)?{m}$"]] for m in names
        }
    if any(layer.kind == "experts" for layer in layers):
        charts["detail: routers on the probe, each layer"] = {
            m: ["Multiline", [rf"^val/moe/(\d+|mean)/{m}$"]] for m in PROBE_MEASURES
        }
    return charts


def _margin(name: str) -> list:
    return ["Margin", [f"{name}_{end}" for end in ("mean", "min", "max")]]


def result_names(layers: Sequence[Layer]) -> list[str]:
    """Held-out measures of the HParams table; a run's last values are its final numbers."""
    kinds = {layer.kind for layer in layers}
    where = ("codes/mean" if sum(layer.kind == "codes" for layer in layers) > 1 else "codes",)
    where = (*(where if "codes" in kinds else ()), *(("moe/mean",) if "experts" in kinds else ()))
    names = ("used", "entropy", "perplexity", "max_vio")
    errors = ("val/loss", "val/bits_per_byte") if "experts" in kinds else ("val/loss", "val/mse")
    return [*errors, *(f"val/{w}/{m}" for w in where for m in names), "speed/tokens_per_s"]
