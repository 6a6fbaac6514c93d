"""Experts that select themselves by the size of their own activation (Autonomy-of-Experts)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.core.bank import Bank, Transform
from simvq_moe.core.moments import match_shape, moments
from simvq_moe.moe.routers.base import Gates, Router


class SelfSelectingRouter(Router):
    """Logits |K_i x|, the norm of the low-rank activation with which expert i would begin.

    The first projection of an expert (of SwiGLU the gate) is U_i K_i (arXiv:2501.13074, section 3):
    K_i, its key, belongs to the router, and U_i to the experts, which are given K. A map A on the
    experts' inputs is a map of the keys, K_i A: `enter` applies it once a token, for router and
    experts alike, so it reaches the choice.

    Args:
        width: channels of a token.
        experts, top_k, gates: see `Router`.
        rank: rows of a key.
        transform, train_base, map_rank: of the bank of keys, which start from N(0, 1/width).

    Raises:
        ValueError: separate maps, which can't be applied once a token.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        top_k: int,
        *,
        gates: Gates = "topk_softmax",
        rank: int = 8,
        transform: Transform = "none",
        train_base: bool = True,
        map_rank: int = 8,
    ) -> None:
        super().__init__(experts, top_k, gates=gates)
        if transform == "separate":
            raise ValueError(
                "expert_in_map 'separate' with router 'self_selecting': its keys are separate "
                "already: use a shared map or 'none'"
            )
        keys = torch.randn(experts, rank, width) / width**0.5
        self.keys = Bank(keys, transform=transform, train_base=train_base, rank=map_rank)

    def start(self, x: Float[Tensor, "tokens width"]) -> None:
        """Turn the keys to the principal directions of the inputs, by A."""
        assert self.keys is not None
        match_shape(self.keys, moments(x)[1])

    def score(
        self, x: Float[Tensor, "tokens width"], token_ids: Int[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens experts"]:
        """Norms of the activations of tokens that have gone through `enter`."""
        del token_ids
        assert self.keys is not None
        activations = x @ self.keys.base.to(x.dtype).flatten(0, 1).T
        return activations.unflatten(-1, (self.num_experts, -1)).norm(dim=-1)

    @torch.no_grad()
    def reset(self, std: float) -> None:
        assert self.keys is not None
        self.keys.base.normal_(std=std)

    @torch.no_grad()
    def fold_(self) -> None:
        assert self.keys is not None
        self.keys = self.keys.fold()
