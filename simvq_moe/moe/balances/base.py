"""What balance methods share: a loss that is always measured, and biases that decide the choice.

A bias is added to scores in [0, 1]: the softmax over all experts, or sigmoids where the gates are
sigmoids. Gates are formed without it. It changes after each optimizer step, from the choices of all
ranks and micro-batches (`after_step`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.moe import BalanceOptions
from simvq_moe.core.step_state import StepState
from simvq_moe.core.usage import once


@dataclass(frozen=True)
class Balance(BalanceOptions):
    """A method that has the load-balance loss, weighted or not, and no biases."""

    def loss(
        self, logits: Float[Tensor, "tokens experts"], counts: Int[Tensor, " experts"]
    ) -> Float[Tensor, ""]:
        return load_balance_loss(logits, counts)

    def biases(self, experts: int, top_k: int) -> SelectionBias | None:
        del experts, top_k
        return None


class SelectionBias(StepState):
    """One bias an expert, persistent, from 0.

    Args:
        experts: number of experts.
        sums: numbers to be added up in a step.
    """

    bias: Tensor

    def __init__(self, experts: int, sums: int) -> None:
        super().__init__(sums)
        self.register_average("bias", torch.zeros(experts), torch.float32)

    def count(self, places: Int[Tensor, " draws"]) -> None:
        """Add 1 to the numbers of these places that are added up in a step."""
        self.pending.scatter_add_(
            0, places, once(torch.ones_like(places, dtype=self.pending.dtype))
        )

    @abstractmethod
    def choose(
        self, scores: Float[Tensor, "tokens experts"], top_k: int
    ) -> Int[Tensor, "tokens choices"]:
        """Ids of the experts with the largest biased scores, best first."""


def load_balance_loss(
    logits: Float[Tensor, "tokens experts"], counts: Int[Tensor, " experts"]
) -> Float[Tensor, ""]:
    """N sum_i f_i P_i (Switch Transformer, arXiv:2101.03961, eq. 4); 1 when both are even, and 0
    of no tokens.

    f_i is the share of all assignments, over all top_k choices, that go to expert i; P_i the mean
    probability that the router gives it. Only P has a gradient.

    Args:
        counts: assignments of each expert, summed over ranks if the loss is to be the same however
            the global batch is split.
    """
    if not len(logits):
        return logits.sum()
    share = (counts / counts.sum().clamp_min(1)).to(logits.dtype)
    return len(counts) * (share * logits.softmax(-1).mean(0)).sum()
