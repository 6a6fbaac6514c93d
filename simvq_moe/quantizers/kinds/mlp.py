"""SimVQ with a perceptron in place of the linear map, to see what linearity does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.config.registry import register
from simvq_moe.core.bank import wide
from simvq_moe.quantizers.codebook import Quantizer, random_codebook
from simvq_moe.quantizers.options import CodebookOptions


class MLPVQ(Quantizer):
    """SimVQ with a residual perceptron for a map: codes q + f(q), f two layers that start at 0.

    Args:
        codes: number of codes; their base rows q ~ N(0, 1/width) are frozen.
        width: channels of a code.
        hidden: channels between the two layers; None: 4 width.
        options: those of `Quantizer`.
    """

    def __init__(
        self, codes: int, width: int, *, hidden: int | None = None, **options: Any
    ) -> None:
        super().__init__(codes, width, **options)
        self.base: Tensor
        self.register_buffer("base", random_codebook(codes, width))
        self.up = nn.Linear(width, hidden or 4 * width)
        self.down = nn.Linear(hidden or 4 * width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        return self._map(self.base, dtype)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        return self._map(self.base[ids], dtype)

    def _map(self, q: Tensor, dtype: torch.dtype | None) -> Tensor:
        dtype = dtype or q.dtype
        compute = wide(dtype)
        up, down = (
            [p.to(compute) for p in (layer.weight, layer.bias)] for layer in (self.up, self.down)
        )
        hidden = F.gelu(F.linear(q.to(compute), *up))
        return (q.to(compute) + F.linear(hidden, *down)).to(dtype)


@register
@dataclass(frozen=True)
class MLPVQOptions(CodebookOptions):
    """Frozen rows under one shared perceptron, to see what linearity does."""

    quantizer = MLPVQ
    kind: Literal["mlp_vq"] = "mlp_vq"
