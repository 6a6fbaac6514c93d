"""What probe.npz says about one layer of an arm: which experts go together, and on what they work.

Co-activation and domain specialization of OLMoE (arXiv:2409.02060, section 5), both as multiples of
even chance, so that arms share a scale.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from simvq_moe.analysis.runs import Arm, Group, Run
from simvq_moe.moe.measures import co_activation

MOST_EXPERTS = 128
"""Of more, those with the most tokens are shown."""


@dataclass(frozen=True)
class RoutingOf:
    """One layer at the last evaluation, on the probe's tokens."""

    arm: str
    seed: int
    layer: int
    """The middle one."""
    experts: list[int]
    """Their numbers, from the one with the most tokens on; rows and columns follow it."""
    co_activation: list[list[float]]
    """[expert][expert]: share of the first one's tokens that have the second one as well, over
    (k - 1) / (N - 1). Empty where a token has one expert."""
    domains: list[str]
    """From the one with the most tokens on."""
    specialization: list[list[float]]
    """[domain][expert]: share of the domain's tokens that have the expert, over k / N."""


def routings_of(group: Group) -> list[RoutingOf]:
    """Of each arm's first finished run that has a probe."""
    return [found for arm in group.arms if (found := _first(arm)) is not None]


def _first(arm: Arm) -> RoutingOf | None:
    for run in arm.runs:
        if run.status == "finished" and (probe := _read(run.path / "probe.npz")):
            return _routing(arm.name, run, probe)
    return None


def _read(file: Path) -> dict[str, np.ndarray]:
    """Empty where there is none that can be read."""
    try:
        # opened here, for numpy leaves a torn file open
        with file.open("rb") as stream, np.load(stream) as arrays:
            names = ("ids", "domain_counts", "domain_names", "domains")
            return {name: arrays[name] for name in names}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return {}


def _routing(arm: str, run: Run, probe: dict[str, np.ndarray]) -> RoutingOf:
    layer = probe["ids"].shape[1] // 2
    ids = torch.from_numpy(probe["ids"][-1, layer]).long()
    counts = probe["domain_counts"][-1, layer]
    experts, choices = len(counts), max(1, round(counts.sum() / len(ids)))
    shown = np.argsort(-counts.sum(1), kind="stable")[:MOST_EXPERTS]
    pairs = co_activation(ids, experts).numpy()[np.ix_(shown, shown)] if choices > 1 else None
    names = [str(name) for name in probe["domain_names"]]
    tokens = np.bincount(probe["domains"], minlength=len(names)).clip(min=1)
    shares = (counts[shown] / tokens).T * experts / choices
    return RoutingOf(
        arm=arm,
        seed=run.seed,
        layer=layer,
        experts=shown.tolist(),
        co_activation=[] if pairs is None else _short(pairs * (experts - 1) / (choices - 1)),
        domains=names,
        specialization=_short(shares) if len(names) > 1 else [],
    )


def _short(table: np.ndarray) -> list[list[float]]:
    """Three significant digits: more than a colour shows."""
    return [[float(f"{v:.3g}") for v in row] for row in table]
