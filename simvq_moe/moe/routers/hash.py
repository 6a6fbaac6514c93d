"""A random table from vocabulary ids to experts, without parameters (arXiv:2106.04426)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.moe import Gates, MoEConfig, RouterOptions
from simvq_moe.config.registry import register
from simvq_moe.core.ids import as_ids
from simvq_moe.moe.routers.base import Router, Routing


@register
@dataclass(frozen=True)
class HashOptions(RouterOptions):
    """A random table over vocabulary ids, which sees no channels (2106.04426)."""

    kind: Literal["hash"] = "hash"

    @property
    def conventions(self) -> tuple[Gates, ...]:
        return ("topk_softmax", "sigmoid")

    @property
    def why_conventions(self) -> str:
        return "its gates are equal and sum to 1"

    @property
    def has_scores(self) -> bool:
        return False

    @property
    def takes_biases(self) -> bool:
        return False

    def build(self, width: int, layer: MoEConfig, vocabulary: int | None) -> HashRouter:
        del width
        return HashRouter(vocabulary, layer)


class HashRouter(Router):
    """A random table from vocabulary ids to experts, without parameters (arXiv:2106.04426).

    Balanced over the vocabulary, not over a text: the paper's balanced table weighs tokens by their
    frequency. Every expert has top_k / experts of all entries, up to one; gates are equal.

    Args:
        vocabulary: number of vocabulary ids.
        layer: see `Router`; a token's experts are all different.

    Raises:
        ValueError: there is no vocabulary.
    """

    table: Tensor

    def __init__(self, vocabulary: int | None, layer: MoEConfig) -> None:
        super().__init__(layer)
        if not vocabulary:
            raise ValueError("router 'hash' is a table over the vocabulary: give its size")
        self.register_buffer("table", torch.empty(vocabulary, layer.top_k, dtype=torch.int64))
        self.reset(1.0)

    def forward(
        self,
        x: Float[Tensor, "tokens width"],
        token_ids: Int[Tensor, " tokens"] | None = None,
    ) -> Routing:
        if token_ids is None:
            raise ValueError("router 'hash' goes by vocabulary ids: pass token_ids to the layer")
        ids = self.table[as_ids(token_ids, "token_ids")]
        logits = self.score(x, token_ids)
        return Routing(ids, self.gates_of(logits, ids), logits, {})

    def score(
        self, x: Float[Tensor, "tokens width"], token_ids: Int[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens experts"]:
        """0 for every expert, which makes gates equal."""
        del token_ids
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.new_zeros(len(x), self.num_experts, dtype=dtype)

    @torch.no_grad()
    def reset(self, std: float) -> None:
        """Draw another table."""
        del std
        vocabulary, top_k = self.table.shape
        # token p of a block takes entries p k to p k + k - 1 of a permutation that begins again at
        # its end: all different, and each expert k times in a whole block
        blocks = ceil(vocabulary / self.num_experts)
        orders = torch.rand(blocks, self.num_experts).argsort(1)
        places = torch.arange(self.num_experts * top_k) % self.num_experts
        table = orders[:, places].reshape(-1, top_k)[:vocabulary]
        self.table.copy_(table[torch.randperm(vocabulary)])
