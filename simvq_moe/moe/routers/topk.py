"""The plain router: the experts with the largest products (arXiv:1701.06538, without noise)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.config.moe import MoEConfig
from simvq_moe.config.registry import register
from simvq_moe.core.bank import Bank
from simvq_moe.core.whitening import Whitening
from simvq_moe.moe.products import Product, is_learned, number_of_rows, products_of_map
from simvq_moe.moe.routers.rows import ProductOptions, RowOptions, RowRouter


@dataclass(frozen=True)
class RowProductOptions(RowOptions, ProductOptions):
    """Options of routers that score by x R^T."""


class TopKRouter(RowRouter):
    """Logits x R^T, plus one learned number an expert if wanted, which starts from 0."""

    options: RowProductOptions

    def __init__(self, width: int, layer: MoEConfig) -> None:
        super().__init__(width, layer)
        self.bias = nn.Parameter(torch.zeros(layer.experts)) if self.options.bias else None

    def score(
        self, x: Float[Tensor, "tokens width"], token_ids: Int[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens experts"]:
        del token_ids
        if isinstance(self.centre, Whitening):
            scores = x @ self.turn(self.bank.rows(x.dtype)).T
        else:
            scores = self.bank.score(x)
        return scores if self.bias is None else scores + self.bias.to(x.dtype)

    def rows_of_products(self) -> Float[Tensor, "experts width"] | None:
        return self.turn(self.bank.rows())

    def linear_readers(self) -> list[Bank | Tensor]:
        return [self.bank]

    def products(self, batch_tokens: int) -> Iterator[Product]:
        if not isinstance(self.centre, Whitening):
            yield from super().products(batch_tokens)
            return
        # rows are mapped and turned before they meet the tokens
        bank, learned = self.bank, is_learned(self.bank.base)
        moves = learned or bool(bank.maps)
        yield from super(RowRouter, self).products(batch_tokens)
        yield Product(number_of_rows(bank) * bank.width, moves)
        yield from products_of_map(bank, number_of_rows(bank) / batch_tokens, learned)
        yield from self.products_of_turn(batch_tokens, learned=moves)

    @torch.no_grad()
    def reset(self, std: float) -> None:
        super().reset(std)
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def fold_(self) -> None:
        if isinstance(self.centre, Whitening):
            rows, bias = self.centre.fold(self.bank.rows())
            self.bank = Bank(rows, transform="none")
            self.bias = nn.Parameter(bias + (0 if self.bias is None else self.bias))
            self.centre = None
        else:
            super().fold_()


@register
@dataclass(frozen=True)
class TopKOptions(RowProductOptions):
    """The largest products x R^T (1701.06538); frozen rows without a map are a random router."""

    router = TopKRouter
    kind: Literal["topk"] = "topk"
