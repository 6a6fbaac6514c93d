"""Experts that select themselves by the size of their own activation (Autonomy-of-Experts)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.moe import MoEConfig, beside
from simvq_moe.config.ranges import Range
from simvq_moe.config.registry import register
from simvq_moe.core.moments import match_shape, moments
from simvq_moe.moe.products import Product, is_learned, products_of_map
from simvq_moe.moe.routers.base import Router, ScoringOptions


class SelfSelectingRouter(Router):
    """Logits |K_i x|, the norm of the low-rank activation with which expert i would begin.

    The first projection of an expert (of SwiGLU the gate) is U_i K_i (arXiv:2501.13074, section 3):
    K_i, its key, belongs to the router, and U_i to the experts, which are given K. A map A on the
    experts' inputs is a map of the keys, K_i A: `enter` applies it once a token, for router and
    experts alike, so it reaches the choice. Keys start from N(0, 1/width).
    """

    options: SelfSelectingOptions

    def __init__(self, width: int, layer: MoEConfig) -> None:
        super().__init__(layer)
        keys = torch.randn(layer.experts, self.options.rank, width) / width**0.5
        map_ = replace(layer.expert_in_map, train_base=self.options.train_base)
        self.keys = map_.bank(keys)

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

    def products(self, batch_tokens: int) -> Iterator[Product]:
        assert self.keys is not None
        yield from super().products(batch_tokens)
        yield Product(self.keys.base.numel(), is_learned(self.keys.base))
        yield from products_of_map(self.keys, 1.0)

    @torch.no_grad()
    def reset(self, std: float) -> None:
        assert self.keys is not None
        self.keys.base.normal_(std=std)

    @torch.no_grad()
    def fold_(self) -> None:
        assert self.keys is not None
        self.keys = self.keys.fold()


@register
@dataclass(frozen=True)
class SelfSelectingOptions(ScoringOptions):
    """Experts that score tokens by the norm of their own low-rank activation (2501.13074).

    The map before the experts is a map of their keys, so it reaches the choice.
    """

    router = SelfSelectingRouter
    kind: Literal["self_selecting"] = "self_selecting"
    rank: Annotated[int, Range(1, 2**12)] = 8
    """Rows of an expert's key, whose activation's norm is its score."""
    train_base: bool = True
    """Learn the keys beside the map before the experts."""
    init: Literal["default", "data"] = "default"
    """data: the map before the experts turns keys to the directions of the first batch."""

    @property
    def starts_from_data(self) -> bool:
        return self.init == "data"

    def changes_of_folding(self) -> dict[str, Any]:
        return super().changes_of_folding() | {"train_base": True, "init": "default"}

    def misfits(self, at: str, layer: MoEConfig, width: int) -> Iterator[str]:
        yield from super().misfits(at, layer, width)
        mapped, kind = beside(at, "expert_in_map"), layer.expert_in_map.kind
        if not layer.expert_in_map.is_shared:
            yield (
                f"{mapped}.kind {kind!r} with {at}.kind 'self_selecting': its keys are separate "
                "already: use a shared map or 'none'"
            )
        if self.starts_from_data and not layer.expert_in_map.starts_from_data:
            yield (
                f"{at}.init 'data' sets {mapped}, whose kind is {kind!r}: use 'linear' or "
                "'diagonal'"
            )
