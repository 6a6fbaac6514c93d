"""Causal attention with rotary positions (arXiv:2104.09864), in windows or inside documents."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.core.state import Stateful
from simvq_moe.models.document_attention import Documents

ROTARY_BASE = 10_000.0


class Attention(Stateful):
    """Causal multi-head attention with rotary positions.

    Args:
        qk_norm: RMSNorm over the channels of each query and each key, before they are turned
            (arXiv:2010.04245), with a gain for all queries and one for all keys.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, context: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads, self.channels = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(self.channels) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.channels) if qk_norm else None
        half = self.channels // 2
        self.hold("cos", partial(_rotations, context, half, sine=False))
        self.hold("sin", partial(_rotations, context, half, sine=True))

    def forward(
        self, x: Float[Tensor, "batch tokens width"], documents: Documents | None = None
    ) -> Float[Tensor, "batch tokens width"]:
        batch, tokens, width = x.shape
        # the size said, because a batch may be empty
        shape = (batch, tokens, 3 * self.heads, self.channels)
        qk, v = self.qkv(x).view(shape).split([2 * self.heads, self.heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.chunk(2, dim=2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        qk = self._turn(qk, None if documents is None else documents.positions)
        attend = causal_attention if documents is None else documents.attend
        q, k = qk.chunk(2, dim=2)
        y = attend(q, k, v)
        return self.out(y.reshape(batch, tokens, width))

    def _turn(
        self,
        x: Float[Tensor, "batch tokens heads channels"],
        positions: Int[Tensor, "batch tokens"] | None,
    ) -> Tensor:
        """Each pair (x_i, x_{i + channels / 2}) turned by its angle: few passes over memory."""
        where = slice(x.shape[1]) if positions is None else positions
        cos, sin = (table[where].to(x.dtype).unsqueeze(-2) for table in (self.cos, self.sin))
        first, second = x.chunk(2, dim=-1)
        return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), sin)


def causal_attention(
    q: Float[Tensor, "batch tokens heads channels"],
    k: Float[Tensor, "batch tokens heads channels"],
    v: Float[Tensor, "batch tokens heads channels"],
) -> Float[Tensor, "batch tokens heads channels"]:
    """What each query has seen of those before it in its window, and of itself."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _rotations(context: int, half: int, *, sine: bool) -> Float[Tensor, "context channels"]:
    """Cosine, or sine with the sign that it has for each half, of every position's angles."""
    rates = ROTARY_BASE ** (-torch.arange(half).float() / half)
    angles = torch.outer(torch.arange(context).float(), rates)
    if sine:
        return torch.cat([-angles.sin(), angles.sin()], dim=1)
    return torch.cat([angles.cos(), angles.cos()], dim=1)
