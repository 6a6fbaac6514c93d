"""A plug-in: a balance method and a kind of expert. `plugins: [my_parts.py]`"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.moe import ExpertOptions
from simvq_moe.config.ranges import Weight
from simvq_moe.config.registry import register
from simvq_moe.moe.balances.base import Balance


@register
@dataclass(frozen=True)
class ImportanceBalance(Balance):
    """The squared coefficient of variation of the experts' probabilities (1701.06538, eq. 7)."""

    kind: Literal["importance"] = "importance"
    weight: Weight = 0.1
    """Weight of the loss."""

    @property
    def loss_weight(self) -> float:
        return self.weight

    def loss(
        self, logits: Float[Tensor, "tokens experts"], counts: Int[Tensor, " experts"]
    ) -> Float[Tensor, ""]:
        del counts
        mean = logits.softmax(-1).mean(0)
        return mean.var(correction=0) * len(mean) ** 2


@register
@dataclass(frozen=True)
class SquaredReluExpert(ExpertOptions):
    """Two projections around a squared ReLU (2109.08668)."""

    kind: Literal["squared_relu"] = "squared_relu"

    @property
    def is_gated(self) -> bool:
        return False

    @property
    def kept_numbers(self) -> int:
        """Before and after the ReLU, and its square."""
        return 3

    def activate(self, x: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch hidden"]:
        return F.relu(x).square()
