"""Routers: which experts a token goes to, and with which weights.

logits = x R^T, R the rows of a bank: plain rows, or Q W with one map shared by all experts, the
key-side counterpart of SimVQ's codebook (arXiv:2411.02038, eq. 4).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from simvq_moe.core.bank import Bank, Transform

Gates = Literal["softmax_topk", "topk_softmax"]


class Routing(NamedTuple):
    """The choice of experts for each token."""

    ids: Tensor
    """int64 (tokens, top_k): the chosen experts, best first."""
    gates: Tensor
    """float (tokens, top_k): their weights in the sum of outputs."""
    logits: Tensor
    """float (tokens, experts): the scores that were compared, float32 at least."""


class TopKRouter(nn.Module):
    """Top-k of the softmax of x R^T (Shazeer et al., arXiv:1701.06538, without noise).

    Args:
        width: channels of a token.
        experts: number of experts.
        top_k: experts of a token.
        gates: "softmax_topk": softmax over all experts, then the choice; "topk_softmax": softmax
            over the chosen, so that the gates sum to 1.
        transform, base_width, train_base: of the bank of rows R = Q W; rows start from
            N(0, 1/base_width).
    """

    def __init__(
        self,
        width: int,
        experts: int,
        top_k: int,
        *,
        gates: Gates = "topk_softmax",
        transform: Transform = "none",
        base_width: int | None = None,
        train_base: bool = True,
    ) -> None:
        super().__init__()
        base_width = base_width or width
        self.top_k = top_k
        self.renormalize = gates == "topk_softmax"
        self.bank = Bank(
            torch.randn(experts, base_width) / base_width**0.5,
            width=width,
            transform=transform,
            train_base=train_base,
        )

    def forward(self, x: Float[Tensor, "tokens width"]) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            logits = self.bank.score(x.to(torch.promote_types(x.dtype, torch.float32)))
            top = logits.topk(self.top_k, dim=-1)
            if self.renormalize:
                gates = top.values.softmax(-1)
            else:
                gates = logits.softmax(-1).gather(-1, top.indices)
        return Routing(top.indices, gates, logits)
