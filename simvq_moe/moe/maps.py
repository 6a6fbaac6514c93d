"""Kinds of maps of a bank's rows: for the rows of a router, and before and after the experts.

Each starts as the identity, so that step 0 is that of the layer without it, and folds into the rows
(`core.bank`). Multiply-adds of a token, once for a shared map: none, width, base width x width,
2 width x rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from simvq_moe.config.moe import MapOptions
from simvq_moe.config.ranges import Channels, Range
from simvq_moe.config.registry import register
from simvq_moe.core.bank import Bank


@dataclass(frozen=True)
class BankMap(MapOptions):
    """A map that `Bank` knows."""

    kind: Literal["none", "diagonal", "linear", "low_rank", "separate"] = "none"

    def bank(self, base: Any, *, width: int | None = None, bias: bool = False) -> Bank:
        own = {"train_base": self.train_base, "bias": bias}
        return Bank(base, width=width, transform=self.kind, **own, **self._more())

    def _more(self) -> dict[str, Any]:
        return {}


@register
@dataclass(frozen=True)
class NoMap(BankMap):
    """Plain rows."""

    kind: Literal["none"] = "none"

    @property
    def learns(self) -> bool:
        return self.train_base


@register
@dataclass(frozen=True)
class DiagonalMap(BankMap):
    """One factor a channel."""

    kind: Literal["diagonal"] = "diagonal"

    @property
    def starts_from_data(self) -> bool:
        return True


@register
@dataclass(frozen=True)
class LinearMap(BankMap):
    """A full matrix."""

    kind: Literal["linear"] = "linear"
    base_width: Channels | None = None
    """Router: channels of a base row; None: those of the rows."""

    @property
    def starts_from_data(self) -> bool:
        return True

    def base_channels(self, width: int) -> int:
        return self.base_width or width


@register
@dataclass(frozen=True)
class LowRankMap(BankMap):
    """W = I + A B."""

    kind: Literal["low_rank"] = "low_rank"
    rank: Annotated[int, Range(1, 2**12)] = 8
    """Rank of A B."""

    def _more(self) -> dict[str, Any]:
        return {"rank": self.rank}


@register
@dataclass(frozen=True)
class SeparateMaps(BankMap):
    """A full matrix for each expert, none for a router: the control for sharing."""

    kind: Literal["separate"] = "separate"

    @property
    def is_shared(self) -> bool:
        return False
