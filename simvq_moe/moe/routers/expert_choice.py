"""Routers that choose in another way: experts pick their tokens, or a table does."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.core.ids import as_ids
from simvq_moe.moe.routers.base import NOBODY, Gates, Router, Routing, TopKRouter


class ExpertChoiceRouter(TopKRouter):
    """Each expert takes its best tokens of the batch (expert choice, arXiv:2202.09368).

    As many as ceil(tokens top_k / experts), by S = softmax over experts of x R^T; the gates are S.
    Every load is even. A token may go to no expert or to all. The choice is not causal: whether a
    token is taken depends on later ones and on other sequences of this rank's batch, so losses of
    language models flatter, and generation differs.

    Args:
        width, experts, top_k: see `TopKRouter`; top_k is the mean number of experts of a token.
        gates: "softmax_topk" only.
        options: further arguments of `TopKRouter`.

    Raises:
        ValueError: another convention of the gates.
    """

    leaves_open = True

    def __init__(
        self, width: int, experts: int, top_k: int, *, gates: Gates, **options: Any
    ) -> None:
        if gates != "softmax_topk":
            raise ValueError(
                f"gates {gates!r} with router 'expert_choice': its gates are the softmax over all "
                "experts: use 'softmax_topk'"
            )
        super().__init__(width, experts, top_k, gates=gates, **options)

    def choose(
        self, logits: Float[Tensor, "tokens experts"]
    ) -> tuple[Int[Tensor, "tokens choices"], Float[Tensor, "tokens choices"]]:
        scores = logits.softmax(-1)
        takes = ceil(len(scores) * self.top_k / self.num_experts)
        # by detached scores, for the gradient goes through the gates alone
        taken = scores.detach().topk(takes, dim=0).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, taken, True)
        ids = torch.where(chosen, scores.detach(), -1.0).argsort(-1, descending=True)
        chosen = chosen.gather(-1, ids)
        gates = torch.where(chosen, scores.gather(-1, ids), 0.0)
        return torch.where(chosen, ids, NOBODY), gates


class HashRouter(Router):
    """A random table from vocabulary ids to experts, without parameters (arXiv:2106.04426).

    Balanced over the vocabulary, not over a text: the paper's balanced table weighs tokens by their
    frequency. Every expert has top_k / experts of all entries, up to one; gates are equal.

    Args:
        vocabulary: number of vocabulary ids.
        experts: number of experts.
        top_k: experts of a token, all different.
        gates: a convention whose gates sum to 1.

    Raises:
        ValueError: no vocabulary, or gates that do not sum to 1.
    """

    table: Tensor

    def __init__(
        self,
        vocabulary: int | None,
        experts: int,
        top_k: int,
        *,
        gates: Gates = "topk_softmax",
    ) -> None:
        super().__init__(experts, top_k, gates=gates)
        if not vocabulary:
            raise ValueError("router 'hash' is a table over the vocabulary: give its size")
        if not self.gates_sum_to_one:
            raise ValueError(
                f"gates {gates!r} with router 'hash': its gates are equal and sum to 1: use "
                "'topk_softmax'"
            )
        self.register_buffer("table", torch.empty(vocabulary, top_k, dtype=torch.int64))
        self.reset(1.0)

    def forward(
        self,
        x: Float[Tensor, "tokens width"],
        token_ids: Int[Tensor, " tokens"] | None = None,
    ) -> Routing:
        if token_ids is None:
            raise ValueError("router 'hash' goes by vocabulary ids: pass token_ids to the layer")
        ids = self.table[as_ids(token_ids, "token_ids")]
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = x.new_zeros(len(x), self.num_experts, dtype=dtype)
        return Routing(ids, self.gates_of(logits, ids), logits, {})

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

    @torch.no_grad()
    def fold_(self) -> None:
        pass
