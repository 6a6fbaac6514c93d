"""How each metric is called and printed: one vocabulary for tables, plots and sentences.

A metric is named as in metrics.jsonl ("val/codes/used", "val/moe/mean/max_vio"); what it measures
is the last part of the name, so codes and experts share one row of the table below.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

MISSING = "–"
MINUS = "−"
ALL_BANKS = "mean"
"""In names of curves, "bank/mean/condition": all banks of a run, whatever they are."""
USAGE_MEASURES = (
    "used",
    "dead",
    "starved",
    "perplexity",
    "entropy",
    "max_vio",
    "cv",
    "gini",
)
"""The usage measures of the result table, in its order."""
PAIRED_MEASURES = ("entropy", "used", "max_vio")
"""Usage measures compared with the baseline beside the outcomes."""
ROUTER_MEASURES = (
    "router_entropy",
    "confidence",
    "boundary_margin",
    "importance_cv2",
    "fluctuation",
    "co_activation",
    "domain_information",
    "token_information",
    "output_similarity",
    "input_rank",
    "input_condition",
    "input_mean_share",
    "logits_rank",
    "row_exponent",
)
"""What routers do with the probe's tokens."""


@dataclass(frozen=True)
class Measure:
    """Label and number format of a metric."""

    label: str
    decimals: int | None = None
    """Digits after the point, one fewer from 100 on; None: four significant digits."""
    kind: Literal["number", "share"] = "number"
    """share: between 0 and 1, printed in percent; a difference is in points, never in percent."""
    better: Literal["higher", "lower"] | None = None
    """None: neither, such as a cost that is a choice."""
    log: bool = False
    """Drawn on a logarithmic axis."""
    margin: float | None = None
    """Largest difference that counts as none, for tests of equivalence."""


MEASURES: dict[str, Measure] = {
    "mse": Measure("MSE", better="lower"),
    "psnr": Measure("PSNR (dB)", 2, better="higher"),
    "ssim": Measure("SSIM", 4, better="higher"),
    "mel_distance": Measure("mel distance", 4, better="lower"),
    "si_sdr": Measure("SI-SDR (dB)", 2, better="higher"),
    "stoi": Measure("STOI", 3, better="higher"),
    "pesq": Measure("PESQ", 2, better="higher"),
    "loss": Measure("loss", 4, better="lower"),
    "bits_per_byte": Measure("bits/byte", 4, better="lower", margin=0.005),
    "bits_per_code": Measure("bits/code", 4, better="lower"),
    "unigram_bits_per_code": Measure("bits/code by frequency alone", 4),
    "used": Measure("used", 1, "share", "higher"),
    "dead": Measure("dead", 1, "share", "lower"),
    "starved": Measure("starved", 1, "share", "lower"),
    "perplexity": Measure("perplexity", 1, better="higher"),
    "relative_perplexity": Measure("relative perplexity", 1, "share", "higher"),
    "entropy": Measure("entropy", 3, better="higher"),
    "max_load": Measure("max load", 2, better="lower"),
    "max_vio": Measure("MaxVio", 2, better="lower"),
    "min_vio": Measure("MinVio", 3, better="lower"),
    "cv": Measure("cv", 2, better="lower"),
    "gini": Measure("gini", 3, better="lower"),
    "train_s": Measure("training (s)", 1, better="lower"),
    "wall_s": Measure("wall (s)", 1, better="lower"),
    "tokens_per_s": Measure("tokens/s", 0, better="higher"),
    "mfu": Measure("MFU", 1, "share", "higher"),
    "total": Measure("parameters", 0),
    "trainable": Measure("trainable", 0),
    "peak_mib": Measure("peak memory (MiB)", 0, better="lower"),
    "effective_rank": Measure("effective rank of W", 1),
    "condition": Measure("condition number of W", 1, log=True),
    "stable_rank": Measure("stable rank of W", 1),
    "identity_distance": Measure("distance of W from the identity", 3),
    "indirect_movement": Measure("movement of idle rows by W", 3),
    "staleness": Measure("steps since a row was chosen", 1),
    "router_entropy": Measure("router entropy", 3),
    "confidence": Measure("router confidence p₁ − p₂", 3),
    "boundary_margin": Measure("boundary margin of the logits", 3),
    "importance_cv2": Measure("importance CV²", 3, better="lower"),
    "fluctuation": Measure("first choices changed since the last evaluation", 1, "share"),
    "saturation_at": Measure("router saturation", 1, "share"),
    "co_activation": Measure("co-activation with the most frequent partner", 1, "share"),
    "co_activation_null": Measure("co-activation by chance", 1, "share"),
    "domain_information": Measure("bits that an expert tells about the domain", 3),
    "token_information": Measure("bits that an expert tells about the token", 3),
    "input_rank": Measure("effective rank of the router's input", 1),
    "input_condition": Measure("condition number of the router's input", 0, log=True),
    "input_mean_share": Measure("share of the mean in the router's input", 1, "share"),
    "logits_rank": Measure("effective rank of the logits", 1),
    "row_exponent": Measure("exponent of the router's rows along its input", 2),
    "output_similarity": Measure("cosine of two experts' outputs", 3),
    "output_similarity_before_map": Measure("cosine of two experts' outputs before the map", 3),
}


def measure(name: str) -> Measure:
    """The measure that a metric is of; an unknown one is printed with four digits."""
    leaf = name.rsplit("/", 1)[-1]
    if leaf.isdigit():  # a step, as in "val/moe/mean/saturation_at/150"
        at = measure(name.rsplit("/", 1)[0])
        return replace(at, label=f"{at.label} at step {leaf}")
    return MEASURES.get(leaf, Measure(leaf.replace("_", " ")))


def label(name: str) -> str:
    """A metric's label; a training loss says so, as does the rank of codes rather than of W."""
    if name == "val/codes/effective_rank":
        return "effective rank of the used codes"
    text = measure(name).label
    if name.startswith("bank/") and (kind := name.split("/")[1]) != ALL_BANKS:
        return f"{text}: {kind}"
    return f"training {text}" if name.startswith("train/") else text


def number(name: str, value: float | None, like: float | None = None) -> str:
    """A value as it is printed everywhere.

    Args:
        name: the metric.
        value: None and nan print as missing.
        like: a value whose digits it gets too, so that a spread aligns with its mean.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if measure(name).kind == "share":
        return f"{_fixed(value * 100, 1)} %"
    return _fixed(value, _decimals(name, value if like is None else like))


def mean_and_sd(name: str, mean: float | None, sd: float | None) -> str:
    """ "mean ± sd" with one unit; without a spread (one run) the mean alone."""
    if sd is None or not math.isfinite(sd):
        return number(name, mean)
    spread = number(name, sd, like=mean)
    return f"{number(name, mean).removesuffix(' %')} ± {spread}"


def difference(name: str, value: float | None, like: float | None = None) -> str:
    """A signed difference; one of shares is in percentage points."""
    if value is None or not math.isfinite(value):
        return MISSING
    if measure(name).kind == "share":
        return _signed(_fixed(value * 100, 1))
    return _signed(_fixed(value, _decimals(name, value if like is None else like)))


def unit(name: str) -> str:
    """The unit of a difference, where it has one."""
    return " points" if measure(name).kind == "share" else ""


def percent(fraction: float | None) -> str:
    """A signed relative change."""
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    return _signed(f"{_fixed(fraction * 100, 1)} %")


def probability(p: float | None) -> str:
    """A p value: three significant digits at least down to 1e-4, where it ends."""
    if p is None or not math.isfinite(p):
        return MISSING
    if p < 1e-4:
        return "<\u00a00.0001"
    return f"{p:.4f}" if p < 0.1 else f"{p:.3f}"


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    # "-0.00" would give a sign to what rounds to nothing
    return (text.removeprefix("-") if float(text.replace(",", "")) == 0 else text).replace(
        "-", MINUS
    )


def _signed(text: str) -> str:
    """With a sign, but for what rounds to nothing."""
    return text if text.startswith(MINUS) or not re.search("[1-9]", text) else f"+{text}"


def _decimals(name: str, value: float) -> int:
    fixed = measure(name).decimals
    if fixed is not None:
        return max(0, fixed - (abs(value) >= 100))
    if value == 0 or not math.isfinite(value):
        return 4
    return min(12, max(0, 3 - math.floor(math.log10(abs(value)))))
