"""Biases of the choice that would have made the last step even (quantile balancing)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.moe import MoEConfig, beside
from simvq_moe.config.registry import register
from simvq_moe.moe.balances.base import Balance, SelectionBias

SMALLEST, LARGEST, BINS = 1e-7, 4.0, 1000
"""Magnitudes of margins that are told apart, and bins of both signs together."""


@register
@dataclass(frozen=True)
class QuantileBalance(Balance):
    """Biases of the choice at which the last step's loads would have been even.

    Ranks add up 1,000 numbers an expert and layer after each step.
    """

    kind: Literal["quantile"] = "quantile"

    def misfits(self, at: str, layer: MoEConfig, width: int) -> Iterator[str]:
        del width
        if layer.top_k >= layer.experts:
            yield (
                f"{at}.kind 'quantile' with {beside(at, 'top_k')} {layer.top_k} of "
                f"{beside(at, 'experts')} {layer.experts}: every expert is chosen: lower "
                f"{beside(at, 'top_k')}, or use 'none'"
            )

    @property
    def has_biases(self) -> bool:
        return True

    def biases(self, experts: int, top_k: int) -> SelectionBias:
        return QuantileBias(experts, top_k)


class QuantileBias(SelectionBias):
    """The bias at which each expert would have had its fair share of the last step's tokens.

    A token's threshold is its (k+1)-th largest biased score. Expert i is chosen where its margin,
    threshold - (score + b_i), is negative, so b_i <- b_i + the k/N quantile of its margins, and the
    mean over experts is taken off (quantile balancing: J. Su, kexue.fm/archives/11619, 2026; Kimi
    K3 technical report, eq. 13 and 14). Like there, quantiles come from histograms, which add up
    over ranks and micro-batches. Unlike there, bins of margins grow with their distance from 0,
    for softmax scores of many experts are far too small for 1,000 even bins.

    Args:
        experts: number of experts.
        top_k: experts of a token, fewer than there are.
    """

    edges: Tensor

    def __init__(self, experts: int, top_k: int) -> None:
        super().__init__(experts, experts * BINS)
        self.experts, self.top_k = experts, top_k
        self.hold("edges", edges_of_bins)

    @torch.no_grad()
    def choose(
        self, scores: Float[Tensor, "tokens experts"], top_k: int
    ) -> Int[Tensor, "tokens choices"]:
        biased = scores + self.bias.to(scores.dtype)
        best = biased.topk(top_k + 1, dim=-1)
        if self.collects:
            margins = (best.values[:, -1:] - biased).to(self.edges.dtype)
            bins = torch.bucketize(margins, self.edges, right=True) - 1
            bins = bins.clamp(0, BINS - 1)
            bins = bins + BINS * torch.arange(self.experts, device=bins.device)
            self.count(bins.reshape(-1))
        return best.indices[:, :top_k]

    def apply_sums(self, sums: Float[Tensor, " size"]) -> None:
        counts = sums.view(self.experts, BINS)
        below = counts.cumsum(1)
        wanted = below[:, -1:] * self.top_k / self.experts
        bins = torch.searchsorted(below, wanted).clamp_max(BINS - 1)
        inside = counts.gather(1, bins).clamp_min(1)
        part = (wanted - below.gather(1, bins) + inside) / inside
        left, right = self.edges[bins], self.edges[bins + 1]
        change = (left + part * (right - left)).squeeze(1)
        bias = self.bias + torch.where(wanted.squeeze(1) > 0, change, 0)
        self.bias.copy_(bias - bias.mean())


def edges_of_bins() -> Float[Tensor, " edges"]:
    """Edges of the bins of margins, the least first; bins grow with their distance from 0."""
    steps = torch.linspace(0, 1, BINS // 2, dtype=torch.float64)
    above = SMALLEST * (LARGEST / SMALLEST) ** steps
    return torch.cat([-above.flip(0), torch.zeros(1, dtype=torch.float64), above])
