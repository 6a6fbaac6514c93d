"""Biases of the choice that step against the load (loss-free balancing, arXiv:2408.15664)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.ranges import Weight
from simvq_moe.config.registry import register
from simvq_moe.moe.balances.base import Balance, SelectionBias


@register
@dataclass(frozen=True)
class LossFreeBalance(Balance):
    """Biases of the choice, which move by a fixed step (2408.15664).

    Gates and gradients know nothing of them.
    Ranks add up one number an expert and layer after each step.
    """

    kind: Literal["loss_free"] = "loss_free"
    rate: Weight = 0.001
    """Change of a bias in a step, of scores from 0 to 1."""

    @property
    def has_biases(self) -> bool:
        return True

    def biases(self, experts: int, top_k: int) -> SelectionBias:
        del top_k
        return LossFreeBias(experts, self.rate)


class LossFreeBias(SelectionBias):
    """b_i <- b_i + rate sign(mean count - count of i) (loss-free balancing, arXiv:2408.15664).

    Args:
        experts: number of experts.
        rate: change in a step, called u in the paper.
    """

    def __init__(self, experts: int, rate: float = 0.001) -> None:
        super().__init__(experts, experts)
        self.rate = rate

    @torch.no_grad()
    def choose(
        self, scores: Float[Tensor, "tokens experts"], top_k: int
    ) -> Int[Tensor, "tokens choices"]:
        ids = (scores + self.bias.to(scores.dtype)).topk(top_k, dim=-1).indices
        if self.collects:
            self.count(ids.reshape(-1))
        return ids

    def apply_sums(self, sums: Float[Tensor, " size"]) -> None:
        self.bias += self.rate * (sums.mean() - sums).sign()
