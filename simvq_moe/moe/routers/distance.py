"""A router that is a codebook: it chooses the nearest rows as SimVQ does (arXiv:2411.02038)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.moe import MoEConfig
from simvq_moe.config.ranges import Weight
from simvq_moe.config.registry import register
from simvq_moe.core.moments import moments
from simvq_moe.core.search.centring import far_centre
from simvq_moe.moe.products import Product, is_learned, number_of_rows, products_of_map
from simvq_moe.moe.routers.rows import RowOptions, RowRouter

CODEBOOK, COMMITMENT = "router_codebook", "router_commitment"
"""Names of its losses."""


class DistanceRouter(RowRouter):
    """Logits -|x - r_i|^2 / sqrt(width), and SimVQ's two losses for the chosen rows.

    With rows as long as the inputs the logits of a token differ by order one, as those of attention
    do. Rows start as SimVQ's codes, of length about 1, whatever the scale of the model's weights.
    Losses: "router_codebook", |r - sg x|^2, and "router_commitment", |x - sg r|^2, each the mean
    over tokens, choices and channels.
    """

    options: DistanceOptions

    @property
    def by_codebook_alone(self) -> bool:
        return self.options.learns_from == "codebook"

    def score(
        self, x: Float[Tensor, "tokens width"], token_ids: Int[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens experts"]:
        del token_ids
        rows = self.bank.rows(x.dtype)
        if self.by_codebook_alone:
            rows = rows.detach()
        # distances far from the origin can't be told from products of float32; 0 where it is near
        centre = far_centre(rows.detach())
        x, rows = x - centre, rows - centre
        if self.by_codebook_alone:
            products = x @ rows.T
        else:
            products = self.bank.score(x) - x @ centre[:, None]
        distance = x.square().sum(-1, keepdim=True) - 2 * products + rows.square().sum(-1)
        return -distance / x.shape[-1] ** 0.5

    def own_losses(
        self,
        x: Float[Tensor, "tokens width"],
        ids: Int[Tensor, "tokens choices"],
        logits: Float[Tensor, "tokens experts"],
    ) -> dict[str, Tensor]:
        del logits
        rows, x = self.bank.lookup(ids, x.dtype), x[:, None, :]
        number = max(rows.numel(), 1)
        return {
            CODEBOOK: (rows - x.detach()).square().sum() / number,
            COMMITMENT: (x - rows.detach()).square().sum() / number,
        }

    def products(self, batch_tokens: int) -> Iterator[Product]:
        if self.by_codebook_alone:  # scores take the rows, and pass nothing on to them
            yield from super(RowRouter, self).products(batch_tokens)
            yield Product(self.num_experts * self.bank.width, learned=False)
        else:
            yield from super().products(batch_tokens)
        rows = number_of_rows(self.bank) / batch_tokens + self.top_k  # all lengths, the chosen ones
        yield Product(self.bank.width, learned=False)  # with the place they are measured from
        yield from products_of_map(self.bank, rows, is_learned(self.bank.base))

    def start(self, x: Float[Tensor, "tokens width"]) -> None:
        """Give the rows mean and covariance of the inputs, by W and the bias."""
        self.bank.match(*moments(x))

    @torch.no_grad()
    def reset(self, std: float) -> None:
        del std
        super().reset(self.bank.width**-0.5)


@register
@dataclass(frozen=True)
class DistanceOptions(RowOptions):
    """The nearest rows, with SimVQ's two losses for the chosen ones (2411.02038, carried over)."""

    router = DistanceRouter
    kind: Literal["distance"] = "distance"
    codebook_weight: Weight = 1.0
    """Weight of |r - sg x|^2 for the chosen rows r."""
    commitment_weight: Weight = 0.25
    """Weight of |x - sg r|^2 for the chosen rows r."""
    init: Literal["default", "data"] = "default"
    """data: rows get mean and covariance of the first batch, by their map and a bias."""
    learns_from: Literal["all", "codebook"] = "all"
    """codebook: rows learn by the loss |r - sg x|^2 alone, as SimVQ's codes do; no gradient of the
    task or of a balance loss reaches them. A commitment_weight of 0 leaves the inputs alone too."""

    @property
    def learns_by_gates(self) -> bool:
        return False

    @property
    def starts_from_data(self) -> bool:
        return self.init == "data"

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {CODEBOOK: self.codebook_weight, COMMITMENT: self.commitment_weight}

    def changes_of_folding(self) -> dict[str, Any]:
        return super().changes_of_folding() | {"init": "default"}

    def misfits(self, at: str, layer: MoEConfig, width: int) -> Iterator[str]:
        yield from super().misfits(at, layer, width)
        if self.starts_from_data and not self.map.starts_from_data:
            yield (
                f"{at}.init 'data' sets {at}.map, whose kind is {self.map.kind!r}: use 'linear' "
                "or 'diagonal'"
            )
        if self.learns_from == "codebook" and not self.codebook_weight:
            yield (
                f"{at}.learns_from 'codebook' with {at}.codebook_weight 0.0: nothing would move "
                "the rows: use a weight such as 1.0"
            )
