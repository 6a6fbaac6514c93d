"""Codes on the unit sphere: l2-normalized VQ (VQGAN-FC, arXiv:2110.04627)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.registry import register
from simvq_moe.core.bank import wide
from simvq_moe.quantizers.base import AnyQuantizer, refuse_behind_others
from simvq_moe.quantizers.kinds.vq import VQ, VQOptions
from simvq_moe.quantizers.options import level_problems


class CosineVQ(VQ):
    """A codebook on the unit sphere: latents and codes are l2-normalized before they meet.

    Published at width 8, between projections (`Projected`), where it is known as factorized codes.
    By itself it is no residual level behind another, because its codes are all of length 1.
    """

    def join(self, levels: Sequence[AnyQuantizer], place: int) -> None:
        refuse_behind_others(self, levels, place)

    def prepare(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        return to_sphere(z)

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        dtype = dtype or self.bank.base.dtype
        return to_sphere(super().codebook(wide(dtype))).to(dtype)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        dtype = dtype or self.bank.base.dtype
        return to_sphere(super().lookup(ids, wide(dtype))).to(dtype)


def to_sphere(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """x / |x|; below |x| = 1e-3 the length shrinks too, so that the gradient stays bounded."""
    return F.normalize(x, dim=-1, eps=1e-3)


@register
@dataclass(frozen=True)
class CosineVQOptions(VQOptions):
    """Free rows, compared at length 1 (VQGAN-FC, 2110.04627)."""

    quantizer = CosineVQ
    kind: Literal["cosine_vq"] = "cosine_vq"  # pyright: ignore[reportIncompatibleVariableOverride]

    def problems(self, at: str, config: Any) -> Iterator[str]:
        yield from super().problems(at, config)
        yield from level_problems(at, self)
