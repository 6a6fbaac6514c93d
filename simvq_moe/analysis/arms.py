"""Runs, the arms that they belong to, and the groups in which arms are compared."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simvq_moe.records.catalogue import ALL_BANKS
from simvq_moe.runs.sweep_file import Stamp

UNCOMPARED_KEYS = ("seed", "name", "arm", "runs_dir")
"""Config keys that tell runs apart without changing what an arm is."""


@dataclass(frozen=True)
class RunRecord:
    """One training run: one arm, one seed."""

    path: Path
    """The run directory; it need not exist (pending)."""
    arm: str
    """Name of the arm it belongs to."""
    seed: int
    """Seed of initial weights and data order; runs of one seed pair across arms."""
    status: str
    """finished, running, failed, interrupted, pending, missing or broken."""
    error: str | None = None
    """One line that says why it failed, or what of it can't be read."""
    config: dict[str, Any] = field(default_factory=dict)
    """Resolved config, flattened to dotted keys."""
    meta: dict[str, Any] = field(default_factory=dict)
    """meta.json."""
    metrics: tuple[dict[str, float], ...] = ()
    """The readable lines of metrics.jsonl, each step once, the latest line of a step."""
    final: dict[str, float] = field(default_factory=dict)
    """summary.json, or the last evaluation of a run that has none."""
    held_out_counts: np.ndarray | None = None
    """int64 [layer, slot]: draws over the whole held-out set at the last evaluation."""
    samples: tuple[Path, ...] = ()
    """What was made of held-out data, oldest first: images, texts, folders of sounds."""
    left_out: tuple[str, ...] = ()
    """A line for each file that is not needed for the numbers and can't be read."""

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Kind, slots and top_k of every layer that chooses between slots."""
        return self.meta.get("layers") or []

    @property
    def step(self) -> int:
        """The last logged step."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    def layer_counts(self) -> Iterator[np.ndarray]:
        """Held-out counts of each layer, before any capacity, without the padding of layers with
        fewer slots."""
        counts = () if self.held_out_counts is None else self.held_out_counts
        for layer, row in zip(self.layers, counts, strict=False):
            if layer["kind"] != "kept":
                yield row[: layer["slots"]]

    def bank_metrics(self, leaf: str) -> dict[str, list[str]]:
        """Names under which a measure of banks is logged, by the kind of bank.

        See `bank_kind`; ALL_BANKS where names are not recorded.
        """
        names = self.meta.get("banks") or []
        logged = {n for m in self.metrics for n in m if n.startswith("bank/")}
        found: dict[str, list[str]] = {}
        for metric in sorted(logged):
            if match := re.fullmatch(f"bank/([0-9]{{1,9}})/{re.escape(leaf)}", metric):
                found.setdefault(bank_kind(names, int(match[1])), []).append(metric)
        return found

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one metric where it is logged and finite."""
        pairs = [(m["step"], m[name]) for m in self.metrics if math.isfinite(m.get(name, math.nan))]
        found = np.array(pairs, dtype=float).reshape(-1, 2)
        return found[:, 0], found[:, 1]


@dataclass(frozen=True)
class Arm:
    """One condition of a comparison."""

    name: str
    label: str
    control: bool
    """An arm that a claim has to beat, rather than one that the claim is about."""
    runs: tuple[RunRecord, ...]


@dataclass(frozen=True)
class Group:
    """Arms that answer one question, against one baseline."""

    name: str
    question: str
    baseline: str
    outcomes: tuple[str, ...]
    """Metrics that the question is decided on, fixed before the runs."""
    arms: tuple[Arm, ...]
    primary: dict[str, str] = field(default_factory=dict)
    """The arms that decide it, each with its outcome: the tests of Holm's adjustment. Empty: every
    outcome of every arm."""
    predictions: tuple[str, ...] = ()
    """Numbers of the registered predictions that its sweep tests, such as P8."""
    registered: tuple[Stamp, ...] = ()
    """What was written down before its runs, as far as its sweep recorded it."""
    tuned: bool = False
    """Whether a grid chose each arm's learning rate."""
    notes: str = ""
    config: str = ""
    sweep: str = ""
    """Title of the sweep it belongs to; empty for runs that were found one by one."""
    command: str = ""
    """The command that does the whole sweep."""


def bank_kind(names: Sequence[str], i: int) -> str:
    """End of the name of bank i: experts.down of blocks.0.moe.experts.down.

    Args:
        names: those of the run's meta.json.
    """
    words = names[i].split(".") if i < len(names) else [ALL_BANKS]
    return ".".join([word for word in words if not word.isdigit()][-2:])
