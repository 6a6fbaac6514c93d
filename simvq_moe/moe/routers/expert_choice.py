"""Experts that choose their tokens, rather than tokens their experts."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.moe import Gates
from simvq_moe.config.registry import register
from simvq_moe.core.ids import NOBODY
from simvq_moe.moe.routers.topk import RowProductOptions, TopKRouter


class ExpertChoiceRouter(TopKRouter):
    """Each expert takes its best tokens of the batch (expert choice, arXiv:2202.09368).

    As many as ceil(tokens top_k / experts), by S = softmax over experts of x R^T; the gates are S.
    Every load is even. A token may go to no expert or to all. The choice is not causal: whether a
    token is taken depends on later ones and on other sequences of this rank's batch, so losses of
    language models flatter, and generation differs. top_k is the mean number of experts of a token.
    """

    leaves_open = True

    def choose(
        self, logits: Float[Tensor, "tokens experts"]
    ) -> tuple[Int[Tensor, "tokens choices"], Float[Tensor, "tokens choices"]]:
        scores = logits.softmax(-1)
        takes = ceil(len(scores) * self.top_k / self.num_experts)
        # by detached scores, because the gradient goes through the gates alone
        taken = scores.detach().topk(takes, dim=0).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, taken, True)
        ids = torch.where(chosen, scores.detach(), -1.0).argsort(-1, descending=True)
        chosen = chosen.gather(-1, ids)
        gates = torch.where(chosen, scores.gather(-1, ids), 0.0)
        return torch.where(chosen, ids, NOBODY), gates


@register
@dataclass(frozen=True)
class ExpertChoiceOptions(RowProductOptions):
    """Each expert takes its best tokens of the batch: even, but not causal (2202.09368)."""

    router = ExpertChoiceRouter
    kind: Literal["expert_choice"] = "expert_choice"

    @property
    def conventions(self) -> tuple[Gates, ...]:
        return ("softmax_topk",)

    @property
    def why_conventions(self) -> str:
        return "its gates are the softmax over all experts"

    @property
    def takes_biases(self) -> bool:
        return False

    @property
    def takes_capacity(self) -> bool:
        return False
