"""Routers that compare tokens with a prototype of each expert: by cosine, or by distance.

Prototypes are rows of a bank, plain or Q W. With a distance the router is a codebook: its choice is
SimVQ's (arXiv:2411.02038, eq. 4), for the k nearest rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.core.centring import far_centre
from simvq_moe.core.moments import moments
from simvq_moe.moe.routers.base import TopKRouter

START_TEMPERATURE = 0.3


class CosineRouter(TopKRouter):
    """Logits cos(P x, r_i) / t, with P narrow and t learned (X-MoE, arXiv:2204.09179).

    t = 0.3 e^s from s = 0.

    Args:
        width, experts, top_k: see `TopKRouter`.
        projection: rows of P, the channels of the prototypes; None: half the experts, as there.
        base_width: channels of Q in R = Q W; None: those of the prototypes.
        options: further arguments of `TopKRouter`.
    """

    def __init__(
        self, width: int, experts: int, top_k: int, *, projection: int | None = None, **options: Any
    ) -> None:
        narrow = projection or max(1, experts // 2)
        super().__init__(narrow, experts, top_k, **options)
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

    def rows_of_products(self) -> Float[Tensor, "experts width"] | None:
        return None

    @torch.no_grad()
    def reset(self, std: float) -> None:
        super().reset(std)
        self.projection.normal_(std=std)
        self.log_temperature.zero_()


class DistanceRouter(TopKRouter):
    """Logits -|x - r_i|^2 / sqrt(width), and SimVQ's two losses for the chosen rows.

    With rows as long as the inputs the logits of a token differ by order one, as those of attention
    do. Rows start as SimVQ's codes, of length about 1, whatever the scale of the model's weights.
    Losses: "router_codebook", |r - sg x|^2, and "router_commitment", |x - sg r|^2, each the mean
    over tokens, choices and channels.

    Args:
        width, experts, top_k, options: see `TopKRouter`.
    """

    def score(
        self, x: Float[Tensor, "tokens width"], token_ids: Int[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens experts"]:
        del token_ids
        rows = self.bank.rows(x.dtype)
        # distances far from the origin can't be told from products of float32; 0 where it is near
        centre = far_centre(rows.detach())
        x, rows = x - centre, rows - centre
        products = self.bank.score(x) - x @ centre[:, None]
        distance = x.square().sum(-1, keepdim=True) - 2 * products + rows.square().sum(-1)
        return -distance / x.shape[-1] ** 0.5

    def rows_of_products(self) -> Float[Tensor, "experts width"] | None:
        return None

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
            "router_codebook": (rows - x.detach()).square().sum() / number,
            "router_commitment": (x - rows.detach()).square().sum() / number,
        }

    def start(self, x: Float[Tensor, "tokens width"]) -> None:
        """Give the rows mean and covariance of the inputs, by W and the bias that `bias` adds."""
        self.bank.match(*moments(x))

    @torch.no_grad()
    def reset(self, std: float) -> None:
        del std
        super().reset(self.bank.width**-0.5)
