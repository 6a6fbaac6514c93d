"""Causal attention with rotary positions (arXiv:2104.09864), in windows or inside documents."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from simvq_moe.core.state import Stateful

ROTARY_BASE = 10_000.0


class Documents(NamedTuple):
    """The documents in packed windows; the end of a document belongs to it."""

    mask: Bool[Tensor, "batch tokens tokens"]
    """Which keys a query sees: those before it in its document, and itself."""
    positions: Int[Tensor, "batch tokens"]
    """From the start of the document, or of the window."""


def documents_of(tokens: Int[Tensor, "batch tokens"], end_of_text: Int[Tensor, ""]) -> Documents:
    """Where documents lie in windows of tokens, from the ends of text in them."""
    ends = tokens == end_of_text
    starts = ends.roll(1, dims=1)
    starts[:, 0] = True
    number = starts.cumsum(1)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    first = torch.where(starts, place, 0).cummax(1).values
    mask = (number[:, :, None] == number[:, None]) & (place[:, None] >= place)
    return Documents(mask, place - first)


class Attention(Stateful):
    """Causal multi-head attention with rotary positions."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        half = width // heads // 2
        self.hold("cos", partial(_rotations, context, half, sine=False))
        self.hold("sin", partial(_rotations, context, half, sine=True))

    def forward(
        self, x: Float[Tensor, "batch tokens width"], documents: Documents | None = None
    ) -> Float[Tensor, "batch tokens width"]:
        batch, tokens, width = x.shape
        # the size said, for a batch may be empty
        shape = (batch, tokens, 3 * self.heads, width // self.heads)
        qk, v = self.qkv(x).view(shape).split([2 * self.heads, self.heads], dim=2)
        qk = self._turn(qk, None if documents is None else documents.positions)
        q, k, v = (part.transpose(1, 2) for part in (*qk.chunk(2, dim=2), v))
        if documents is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=documents.mask[:, None])
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))

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


def _rotations(context: int, half: int, *, sine: bool) -> Float[Tensor, "context channels"]:
    """Cosine, or sine with the sign that it has for each half, of every position's angles."""
    angles = torch.outer(torch.arange(context).float(), ROTARY_BASE ** (-torch.arange(half) / half))
    if sine:
        return torch.cat([-angles.sin(), angles.sin()], dim=1)
    return torch.cat([angles.cos(), angles.cos()], dim=1)
