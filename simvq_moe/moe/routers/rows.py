"""What routers share that compare tokens with rows, and those that score by products with them.

The rows R of a bank are plain, or Q W with one map shared by all experts, the key-side counterpart
of SimVQ's codebook (arXiv:2411.02038, eq. 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from simvq_moe.config.moe import MapOptions, MoEConfig, WhiteningOptions
from simvq_moe.core.bank import Bank
from simvq_moe.core.running_mean import RunningMean
from simvq_moe.core.whitening import Whitening
from simvq_moe.moe.maps import NoMap
from simvq_moe.moe.products import Product, is_learned, products_of_map
from simvq_moe.moe.routers.base import Router, ScoringOptions
from simvq_moe.moe.whitening import NoWhitening


@dataclass(frozen=True)
class ProductOptions(ScoringOptions):
    """Options of routers whose logits are products of tokens and rows."""

    bias: bool = False
    """Add one learned number an expert to the logits."""
    whiten: WhiteningOptions = field(default_factory=NoWhitening)
    """Map of the rows that running moments of the input set."""

    @property
    def learns_by_gates(self) -> bool:
        return True

    @property
    def whitens(self) -> bool:
        """Whether it whitens its input."""
        return self.whiten.kind != "none"

    def centring(self, width: int) -> RunningMean | Whitening | None:
        return self.whiten.build(width) or super().centring(width)

    def changes_of_folding(self) -> dict[str, Any]:
        # a whitening becomes rows and biases
        own = {"whiten": NoWhitening(), "bias": self.bias or self.whitens}
        return super().changes_of_folding() | own

    def misfits(self, at: str, layer: MoEConfig, width: int) -> Iterator[str]:
        yield from super().misfits(at, layer, width)
        if self.centre and self.whitens:
            yield (
                f"{at}.centre with {at}.whiten.kind {self.whiten.kind!r}, which centres as well: "
                f"drop {at}.centre"
            )


@dataclass(frozen=True)
class RowOptions(ScoringOptions):
    """Options of routers that compare tokens with one row of a bank for each expert."""

    map: MapOptions = field(default_factory=NoMap)
    """Map W of the rows: logits = x (Q W)^T."""

    @property
    def learns_by_gates(self) -> bool:
        return self.map.learns

    def changes_of_folding(self) -> dict[str, Any]:
        return super().changes_of_folding() | {"map": NoMap()}

    def misfits(self, at: str, layer: MoEConfig, width: int) -> Iterator[str]:
        yield from super().misfits(at, layer, width)
        if not self.map.is_shared:
            yield (
                f"{at}.map.kind {self.map.kind!r}: a router's rows are separate already: use "
                "another kind"
            )


class RowRouter(Router):
    """A router that compares tokens with one row of a bank for each expert.

    They are the bank R = Q W, and a vector is added to all of them where data start it; rows of Q
    start from N(0, 1/base_width).

    Args:
        width: channels of a row.
        layer: see `Router`.
    """

    def __init__(self, width: int, layer: MoEConfig) -> None:
        super().__init__(layer)
        map_ = self.options.map
        base_width = map_.base_channels(width)
        rows = torch.randn(layer.experts, base_width) / base_width**0.5
        self.bank: Bank = map_.bank(rows, width=width, bias=self.options.starts_from_data)

    def products(self, batch_tokens: int) -> Iterator[Product]:
        yield from super().products(batch_tokens)
        yield Product(self.bank.base.numel(), is_learned(self.bank.base))
        yield from products_of_map(self.bank, 1.0)

    @torch.no_grad()
    def reset(self, std: float) -> None:
        # rows of the same length whatever the width of the base
        base_width = self.bank.base.shape[-1]
        self.bank.base.normal_(std=std * (self.bank.width / base_width) ** 0.5)

    @torch.no_grad()
    def fold_(self) -> None:
        self.bank = self.bank.fold()
