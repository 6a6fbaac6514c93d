"""The load-balance loss N sum_i f_i P_i (Switch Transformer, arXiv:2101.03961, eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simvq_moe.config.ranges import Weight
from simvq_moe.config.registry import register
from simvq_moe.moe.balances.base import Balance


@register
@dataclass(frozen=True)
class AuxBalance(Balance):
    """The load-balance loss of each layer, a part of the model's loss (2101.03961).

    It changes what the router learns. Ranks add up one integer an expert and layer for it.
    """

    kind: Literal["aux"] = "aux"
    weight: Weight = 0.01
    """Weight of the loss."""

    @property
    def loss_weight(self) -> float:
        return self.weight
