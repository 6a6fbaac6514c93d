"""A router that compares tokens and prototypes by cosine, in a few channels (X-MoE)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.config.moe import MoEConfig
from simvq_moe.config.ranges import Channels
from simvq_moe.config.registry import register
from simvq_moe.moe.products import Product, is_learned, number_of_rows, products_of_map
from simvq_moe.moe.routers.rows import RowOptions, RowRouter

START_TEMPERATURE = 0.3


class CosineRouter(RowRouter):
    """Logits cos(P x, r_i) / t, with P narrow and t learned (X-MoE, arXiv:2204.09179).

    t = 0.3 e^s from s = 0. P has half as many rows as there are experts if not set, as there, and
    the prototypes R = Q W are as wide.
    """

    def __init__(self, width: int, layer: MoEConfig) -> None:
        assert isinstance(layer.router, CosineOptions)
        narrow = layer.router.projection or max(1, layer.experts // 2)
        super().__init__(narrow, layer)
        self.projection = nn.Parameter(torch.randn(narrow, width) / width**0.5)
        # one element, for DeepSpeed can't send a parameter without an axis
        self.log_temperature = nn.Parameter(torch.zeros(1))

    def score(
        self, x: Float[Tensor, "tokens width"], token_ids: Int[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens experts"]:
        del token_ids
        x = F.normalize(x @ self.projection.to(x.dtype).T, dim=-1)
        rows = F.normalize(self.bank.rows(x.dtype), dim=-1)
        temperature = START_TEMPERATURE * self.log_temperature.to(x.dtype).exp()
        return x @ rows.T / temperature

    def products(self, batch_tokens: int) -> Iterator[Product]:
        bank, learned = self.bank, is_learned(self.bank.base)
        yield Product(self.projection.numel())
        yield Product(number_of_rows(bank) * bank.width, learned or bool(bank.maps))
        yield from products_of_map(bank, number_of_rows(bank) / batch_tokens, learned)

    @torch.no_grad()
    def reset(self, std: float) -> None:
        super().reset(std)
        self.projection.normal_(std=std)
        self.log_temperature.zero_()


@register
@dataclass(frozen=True)
class CosineOptions(RowOptions):
    """The largest cosines in a narrow projection, with a learned temperature (2204.09179)."""

    router = CosineRouter
    kind: Literal["cosine"] = "cosine"
    projection: Channels | None = None
    """Channels in which tokens and experts are compared; None: half the experts."""
