"""The plain router with learned Gaussian noise in training (arXiv:1701.06538, eq. 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.config.moe import MoEConfig
from simvq_moe.config.registry import register
from simvq_moe.core.bank import Bank
from simvq_moe.core.whitening import Whitening
from simvq_moe.moe.products import Product
from simvq_moe.moe.routers.topk import RowProductOptions, TopKRouter


class NoisyTopKRouter(TopKRouter):
    """Logits x R^T + N(0, 1) softplus(x N^T), the noise in training only (arXiv:1701.06538, eq. 4).

    N starts at 0, as in the paper's appendix A, which is noise of width ln 2. With a bias N has one
    as well.
    """

    def __init__(self, width: int, layer: MoEConfig) -> None:
        super().__init__(width, layer)
        self.noise = nn.Parameter(torch.zeros(layer.experts, width))
        self.noise_bias = None if self.bias is None else nn.Parameter(torch.zeros(layer.experts))

    def score(
        self, x: Float[Tensor, "tokens width"], token_ids: Int[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens experts"]:
        logits = super().score(x, token_ids)
        if not self.training:
            return logits
        widths = x @ self.turn(self.noise.to(x.dtype)).T
        if self.noise_bias is not None:
            widths = widths + self.noise_bias.to(x.dtype)
        return logits + torch.randn_like(logits) * F.softplus(widths)

    def linear_readers(self) -> list[Bank | Tensor]:
        return [*super().linear_readers(), self.noise]

    def products(self, batch_tokens: int) -> Iterator[Product]:
        yield Product(self.noise.numel())
        yield from self.products_of_turn(batch_tokens)
        yield from super().products(batch_tokens)

    @torch.no_grad()
    def reset(self, std: float) -> None:
        super().reset(std)
        self.noise.zero_()
        if self.noise_bias is not None:
            self.noise_bias.zero_()

    @torch.no_grad()
    def fold_(self) -> None:
        if isinstance(self.centre, Whitening):
            rows, bias = self.centre.fold(self.noise)
            self.noise.copy_(rows)
            self.noise_bias = nn.Parameter(
                bias + (0 if self.noise_bias is None else self.noise_bias)
            )
        super().fold_()


@register
@dataclass(frozen=True)
class NoisyTopKOptions(RowProductOptions):
    """The router topk with learned Gaussian noise in training (1701.06538, eq. 4)."""

    router = NoisyTopKRouter
    kind: Literal["noisy_topk"] = "noisy_topk"
