"""What probe.npz says about one layer of an arm: which experts go together, and on what they work.

Co-activation and domain specialization of OLMoE (arXiv:2409.02060, section 5), both as multiples of
even chance, so that arms share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from simvq_moe.analysis.arms import Arm, Group, RunRecord
from simvq_moe.core.ids import NOBODY
from simvq_moe.files.regular import BrokenFileError, printable
from simvq_moe.moe.routing_measures import co_activation
from simvq_moe.runs.counts import read_probe

MOST_EXPERTS = 128
"""Experts that are shown, at most: those with the most tokens."""


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
    """Names of domains, that with the most tokens first."""
    specialization: list[list[float]]
    """[domain][expert]: share of the domain's tokens that have the expert, over k / N."""


def routings_of(group: Group, left_out: list[str] | None = None) -> list[RoutingOf]:
    """Routings of each arm's first finished run that has a probe.

    Args:
        left_out: gets a line for each file that can't be read.
    """
    lines = [] if left_out is None else left_out
    return [found for arm in group.arms if (found := _first(arm, lines)) is not None]


def _first(arm: Arm, left_out: list[str]) -> RoutingOf | None:
    for run in arm.runs:
        try:
            if run.status == "finished" and (probe := read_probe(run.path)):
                return _routing(arm.name, run, probe)
        except BrokenFileError as error:
            left_out.append(str(error))
    return None


def _routing(arm: str, run: RunRecord, probe: dict[str, np.ndarray]) -> RoutingOf:
    layer = probe["ids"].shape[1] // 2
    ids = torch.from_numpy(probe["ids"][-1, layer]).long()
    counts = probe["domain_counts"][-1, layer]
    experts, choices = len(counts), max(1, round(counts.sum() / len(ids)))
    shown = np.argsort(-counts.sum(1), kind="stable")[:MOST_EXPERTS]
    names = [printable(str(name)) for name in probe["domain_names"]]
    tokens = np.bincount(probe["domains"], minlength=len(names)).clip(min=1)
    shares = (counts[shown] / tokens).T * experts / choices
    return RoutingOf(
        arm=arm,
        seed=run.seed,
        layer=layer,
        experts=shown.tolist(),
        co_activation=_pairs(ids, shown, experts, choices),
        domains=names,
        specialization=_short(shares) if len(names) > 1 else [],
    )


def _pairs(ids: torch.Tensor, shown: np.ndarray, experts: int, choices: int) -> list[list[float]]:
    """Co-activation of the shown experts alone: of all pairs there may be billions."""
    if choices == 1:
        return []
    place = torch.full((experts + 1,), NOBODY)  # the last one is nobody's
    place[torch.from_numpy(shown)] = torch.arange(len(shown))
    shares = co_activation(place[ids], len(shown)).numpy()
    return _short(shares * (experts - 1) / (choices - 1))


def _short(table: np.ndarray) -> list[list[float]]:
    """Three significant digits: more than a colour shows."""
    return [[float(f"{v:.3g}") for v in row] for row in table]
