"""Measures of many windows of counts at once, as `simvq_moe.core.usage` defines them for one."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from simvq_moe.core.usage import null_usage
from simvq_moe.records.dead_slots import NAMES_SHOWN, ranges

SHOWN = ("used", "entropy", "max_vio")
"""Measures that have a chart over steps."""
STARVED = 0.1
"""A slot is starved that is drawn, but less than this part of the fair share."""
MOST_SPELLS = 40
"""Rows of dead, and of starved slots of a layer; the longest come first."""


def thinned(windows: int, most: int) -> np.ndarray:
    """Indices of at most so many windows, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, windows - 1, min(windows, most)).round().astype(np.int64))


def over_windows(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Measures of each window; nan where nothing was drawn.

    Args:
        counts: draws, int64 [window, slot].
    """
    n = counts.astype(np.float64)
    slots, total = n.shape[1], n.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        f = n / total
        entropy = -np.where(f > 0, f * np.log(f), 0.0).sum(1)
        found = {
            "used": (n > 0).mean(1),
            "dead": (n == 0).mean(1),
            "starved": ((n > 0) & (n < STARVED * (total / slots))).mean(1),
            "entropy": entropy / np.log(slots) if slots > 1 else np.ones(len(n)),
            "max_vio": f.max(1) * slots - 1,
        }
    return {name: np.where(total[:, 0] > 0, values, np.nan) for name, values in found.items()}


@lru_cache(4096)
def chance(slots: int, draws: int) -> dict[str, float]:
    """What perfectly even chance would score with as many draws."""
    null = null_usage(slots, draws).as_dict()
    return {name: null[name] for name in SHOWN}


def spells(steps: np.ndarray, counts: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    """Slots that are dead or starved in the last window, with the step when they last were not.

    Args:
        steps: where each window ends.
        counts: draws of a layer, int64 [window, slot].
    """
    fair = counts >= STARVED * counts.mean(1, keepdims=True)
    dead = counts[-1] == 0
    return {
        "dead": _grouped(steps, counts > 0, dead),
        "starved": _grouped(steps, fair, ~dead & ~fair[-1]),
    }


def _grouped(steps: np.ndarray, well: np.ndarray, ill: np.ndarray) -> list[dict[str, Any]]:
    """Ill slots by the last window in which they were well, those longest ill first."""
    ids = np.flatnonzero(ill)
    last_well = last_true(well[:, ids])
    groups = []
    for at in np.unique(last_well)[:MOST_SPELLS]:
        of_group = ids[last_well == at]
        named = ranges(of_group)
        groups.append(
            {
                "since": None if at < 0 else int(steps[at]),
                "slots": named[:NAMES_SHOWN],
                "more": max(0, len(named) - NAMES_SHOWN),
                "number": len(of_group),
            }
        )
    return groups


def last_true(mask: np.ndarray) -> np.ndarray:
    """The last row of each column that is true; -1: none is."""
    last = len(mask) - 1 - mask[::-1].argmax(0)
    return np.where(mask.any(0), last, -1)


def plain(values: np.ndarray) -> list[float | None]:
    """Numbers for JSON, to six digits; None is nan."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]
