"""How numbers are printed: one way for tables, plots and sentences."""

from __future__ import annotations

import math
import re

from simvq_moe.records.catalogue import metric

MISSING = "–"
MINUS = "−"


def number(name: str, value: float | None, like: float | None = None) -> str:
    """A value as it is printed everywhere.

    Args:
        name: the metric.
        value: None and nan print as missing.
        like: a value whose digits it gets too, so that a spread aligns with its mean.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if metric(name).is_share:
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
    if metric(name).is_share:
        return _signed(_fixed(value * 100, 1))
    return _signed(_fixed(value, _decimals(name, value if like is None else like)))


def unit(name: str) -> str:
    """The unit of a difference, where it has one."""
    return " points" if metric(name).is_share else ""


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
    """A number with its sign; what rounds to 0 has none."""
    return text if text.startswith(MINUS) or not re.search("[1-9]", text) else f"+{text}"


def _decimals(name: str, value: float) -> int:
    fixed = metric(name).decimals
    if fixed is not None:
        return max(0, fixed - (abs(value) >= 100))
    if value == 0 or not math.isfinite(value):
        return 4
    return min(12, max(0, 3 - math.floor(math.log10(abs(value)))))
