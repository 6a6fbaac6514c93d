"""A decoder-only language model whose feed-forward layers are mixtures of experts.

RMSNorm (arXiv:1910.07467), rotary positions (arXiv:2104.09864), causal attention, tied head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.core.streams import own_stream
from simvq_moe.moe.layer import build_moe
from simvq_moe.moe.balance import mean_losses
from simvq_moe.moe.router import Routing

ROTARY_BASE = 10_000.0
INITIAL_STD = 0.02


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        half = width // heads // 2
        angles = torch.outer(
            torch.arange(context).float(), ROTARY_BASE ** (-torch.arange(half) / half)
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(
        self, x: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens width"]:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self._turn(q), self._turn(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))

    def _turn(self, x: Float[Tensor, "batch heads tokens channels"]) -> Tensor:
        tokens = x.shape[-2]
        cos, sin = self.cos[:tokens].to(x.dtype), self.sin[:tokens].to(x.dtype)
        even, odd = x.chunk(2, dim=-1)
        return torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)


class Block(nn.Module):
    """Attention, then a mixture of experts, each on its own normalized residual branch."""

    def __init__(self, width: int, heads: int, context: int, moe: Mapping[str, Any]) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads, context)
        self.moe_norm = nn.RMSNorm(width)
        self.moe = build_moe(width, **moe)

    def forward(
        self, x: Float[Tensor, "batch tokens width"], token_ids: Int[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Routing]:
        x = x + self.attention(self.attention_norm(x))
        y, routing = self.moe.route_and_run(self.moe_norm(x), token_ids)
        return x + y, routing


class LanguageModel(nn.Module):
    """Next-token prediction over windows of context + 1 tokens.

    Args:
        vocabulary: number of tokens.
        context: longest sequence.
        width, layers, heads: of the transformer.
        moe: arguments of every `MoE` layer but its width.
        loss_weights: weights of the mean over layers of each loss of `mean_losses`.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        *,
        width: int,
        layers: int,
        heads: int,
        moe: Mapping[str, Any],
        loss_weights: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.loss_weights = dict(loss_weights)
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, context, moe) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self._initialize(layers)

    def forward(
        self, tokens: Int[Tensor, "batch window"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss of windows of context + 1 tokens, and its terms by name."""
        logits, losses = self.logits(tokens[:, :-1])
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        weighted = [self.loss_weights.get(name, 0.0) * term for name, term in losses.items()]
        terms = {"cross_entropy": cross_entropy}
        terms |= {f"{name}_loss": term for name, term in losses.items()}
        return sum(weighted, start=cross_entropy), terms

    def logits(
        self, tokens: Int[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch tokens vocabulary"], dict[str, Tensor]]:
        """Scores of the next token, float32 at least, and the MoE losses averaged over layers."""
        x = self.embedding(tokens)
        routings = []
        for block in self.blocks:
            x, routing = block(x, tokens)
            routings.append(routing)
        # ranks evaluate different numbers of batches, so no collective call may run there
        losses = mean_losses(routings, all_ranks=self.training)
        scores = F.linear(self.norm(x), self.embedding.weight)
        return scores.to(torch.promote_types(scores.dtype, torch.float32)), losses

    @torch.no_grad()
    def _initialize(self, layers: int) -> None:
        """N(0, 0.02) matrices (GPT-2), those that end a branch smaller, so that depth adds up."""
        ending = INITIAL_STD / (2 * layers) ** 0.5
        self.embedding.weight.normal_(std=INITIAL_STD)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention.qkv.weight.normal_(std=INITIAL_STD)
            block.attention.out.weight.normal_(std=ending)
            block.moe.reset(INITIAL_STD, ending)
