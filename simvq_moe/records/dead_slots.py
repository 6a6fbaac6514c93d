"""Dead codes and experts by name: which ids no token drew in the last window, and for how long."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NAMES_SHOWN = 60
"""Ids, or ranges of ids, named in a row of the table."""


class DeadSlots:
    """When each slot of each layer was last drawn, to the log window.

    Args:
        layers: number of layers.
    """

    def __init__(self, layers: int) -> None:
        self.drawn_at: list[np.ndarray | None] = [None] * layers

    def add(self, step: int, counts: Sequence[np.ndarray]) -> None:
        """Take up the window that ends at a step: int64 draws of each layer's slots."""
        for i, n in enumerate(counts):
            before = self.drawn_at[i]
            # 0 is before the first step: never
            before = np.zeros(len(n), dtype=np.int64) if before is None else before
            self.drawn_at[i] = np.where(n > 0, step, before)

    def table(self, names: Sequence[str], step: int) -> str:
        """A Markdown table, a row for each layer and time since the last draw, longest first.

        Args:
            names: of the layers.
            step: the last one taken up.
        """
        rows = ["| layer | dead | for steps | ids |", "| --- | --- | --- | --- |"]
        for name, drawn_at in zip(names, self.drawn_at, strict=True):
            if drawn_at is None:
                continue
            dead = drawn_at < step
            total = f"{int(dead.sum())} of {len(dead)}"
            if not dead.any():
                rows.append(f"| {name} | {total} | | |")
            for since in np.unique(drawn_at[dead]):
                ids = ranges(np.flatnonzero(drawn_at == since))
                named = ", ".join(ids[:NAMES_SHOWN])
                more = f" and {len(ids) - NAMES_SHOWN} more" if len(ids) > NAMES_SHOWN else ""
                long = "always" if since == 0 else str(step - since)
                rows.append(f"| {name} | {total} | {long} | {named}{more} |")
        return "\n".join(rows)


def ranges(ids: np.ndarray) -> list[str]:
    """Sorted ids with neighbours as one: [1, 2, 3, 7] gives 1-3 and 7."""
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs if len(run)]
