"""No balance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simvq_moe.config.registry import register
from simvq_moe.moe.balances.base import Balance


@register
@dataclass(frozen=True)
class NoBalance(Balance):
    """Experts are used as the router chooses."""

    kind: Literal["none"] = "none"
