"""Run folders with counts that a test knows, written by our own writer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simvq_moe.records.run_log import RunLog
from simvq_moe.records.usage_metrics import Layer, usage_metrics

EVERY = 10
"""Steps of a window; each third one ends with an evaluation."""


def write_counted(
    run: Path, layers: Sequence[Layer], counts: Sequence[Sequence[np.ndarray]], **meta: Any
) -> Path:
    """A run whose windows have these draws, [window][layer][slot], and its evaluations twice."""
    run.mkdir(parents=True)
    about = {"status": "finished", "layers": [vars(layer) for layer in layers]}
    (run / "meta.json").write_text(json.dumps(about | meta))
    log = RunLog(run, layers, 0, steps=EVERY * len(counts))
    for i, window in enumerate(counts, start=1):
        evaluated = [2 * n for n in window] if i % 3 == 0 else None
        log.write(EVERY * i, usage_metrics(layers, window), window, evaluated)
    log.close()
    return run


def drawn(rng: np.random.Generator, layers: Sequence[Layer], windows: int) -> list[list[Any]]:
    """Uneven draws of each window and layer; a third of the slots dies."""
    found = []
    for i in range(windows):
        row = []
        for layer in layers:
            shares = np.arange(1, layer.slots + 1) ** 2.0
            shares[rng.permutation(layer.slots)[: layer.slots // 3]] *= i < windows // 2
            row.append(rng.multinomial(40 * layer.slots, shares / shares.sum()))
        found.append(row)
    return found
