"""Kinds of experts: what stands between the first and the last projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from simvq_moe.config.moe import ExpertOptions
from simvq_moe.config.registry import register


@register
@dataclass(frozen=True)
class GeluExpert(ExpertOptions):
    """Two projections around a GELU."""

    kind: Literal["gelu"] = "gelu"

    @property
    def is_gated(self) -> bool:
        return False

    @property
    def kept_numbers(self) -> int:
        """Before and after the GELU."""
        return 2

    def activate(self, x: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch hidden"]:
        return F.gelu(x)


@register
@dataclass(frozen=True)
class SwiGLUExpert(ExpertOptions):
    """Three projections around a gated SiLU (2002.05202)."""

    kind: Literal["swiglu"] = "swiglu"

    @property
    def is_gated(self) -> bool:
        return True

    @property
    def kept_numbers(self) -> int:
        """Gate, its SiLU, value, and their product."""
        return 4

    def activate(self, x: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch hidden"]:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value
