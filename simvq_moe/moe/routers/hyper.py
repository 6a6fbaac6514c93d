"""A router whose rows a frozen network makes from one learned vector (HyperRouter).

The dual of Q W with a frozen Q: there one learned map moves all rows, here one learned vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.config.moe import MoEConfig
from simvq_moe.config.registry import register
from simvq_moe.core.whitening import Whitening
from simvq_moe.moe.products import Product
from simvq_moe.moe.routers.base import Router
from simvq_moe.moe.routers.rows import ProductOptions

LARGEST_HIDDEN = 256


class HyperRouter(Router):
    """Logits x R^T with R = H(e), e learned and H frozen (HyperRouter, arXiv:2312.07035).

    H(e) = relu(e A) B, with A (width, hidden) and B (hidden, experts x width) random. hidden is
    width, at most 256, and there are no biases within H (ours). Nothing is left to fold: what a
    checkpoint holds of a layer is e, A and B.
    """

    options: HyperOptions
    A: Tensor
    B: Tensor

    def __init__(self, width: int, layer: MoEConfig) -> None:
        super().__init__(layer)
        hidden = min(width, LARGEST_HIDDEN)
        self.embedding = nn.Parameter(torch.empty(width))
        # buffers, so that no optimizer and no change of the parameters' precision touches them
        self.register_buffer("A", torch.empty(width, hidden))
        self.register_buffer("B", torch.empty(hidden, layer.experts * width))
        self.bias = nn.Parameter(torch.zeros(layer.experts)) if self.options.bias else None
        self.reset(width**-0.5)

    def rows(self, dtype: torch.dtype | None = None) -> Float[Tensor, "experts width"]:
        """The router's rows, computed in `dtype` (None: as stored)."""
        dtype = dtype or self.B.dtype
        made = (self.embedding.to(dtype) @ self.A.to(dtype)).relu() @ self.B.to(dtype)
        return made.view(self.num_experts, -1)

    def score(
        self, x: Float[Tensor, "tokens width"], token_ids: Int[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens experts"]:
        del token_ids
        scores = x @ self.turn(self.rows(x.dtype)).T
        return scores if self.bias is None else scores + self.bias.to(x.dtype)

    def rows_of_products(self) -> Float[Tensor, "experts width"] | None:
        return self.turn(self.rows())

    def products(self, batch_tokens: int) -> Iterator[Product]:
        yield from super().products(batch_tokens)
        yield Product(self.num_experts * len(self.embedding))
        yield Product((self.A.numel() + self.B.numel()) / batch_tokens, learned=False)
        yield from self.products_of_turn(batch_tokens)

    @torch.no_grad()
    def reset(self, std: float) -> None:
        width, hidden = self.A.shape
        self.embedding.normal_()
        self.A.normal_(std=(2 / width) ** 0.5)
        self.B.normal_(std=std * hidden**-0.5)
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def fold_(self) -> None:
        if isinstance(self.centre, Whitening):
            _, bias = self.centre.fold(self.rows())
            rows, _ = self.centre.fold(self.B.view(-1, len(self.embedding)))
            self.B.copy_(rows.view_as(self.B))
            self.bias = nn.Parameter(bias + (0 if self.bias is None else self.bias))
            self.centre = None


@register
@dataclass(frozen=True)
class HyperOptions(ProductOptions):
    """Largest products with rows that a frozen network makes of one learned vector (2312.07035)."""

    router = HyperRouter
    kind: Literal["hyper"] = "hyper"
