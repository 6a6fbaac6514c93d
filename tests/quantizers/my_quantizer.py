"""A plug-in: a codebook that sees bounded latents. `plugins: [my_quantizer.py]`"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from simvq_moe.config.ranges import Range
from simvq_moe.config.registry import register
from simvq_moe.quantizers import VQ, CodebookOptions


class ShrunkVQ(VQ):
    """Latents are shrunk before they are compared with the codes."""

    def __init__(self, codes: int, width: int, *, factor: float, **options: Any) -> None:
        super().__init__(codes, width, **options)
        self.factor = factor

    def prepare(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        return self.factor * torch.tanh(z)


@register
@dataclass(frozen=True)
class ShrunkVQOptions(CodebookOptions):
    """Free rows that meet shrunk latents."""

    quantizer = ShrunkVQ
    kind: Literal["shrunk_vq"] = "shrunk_vq"
    factor: Annotated[float, Range(0.1, 10)] = 1.0
    """Largest absolute value of a latent."""
