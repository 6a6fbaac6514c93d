"""Quantizers whose codes are points of a grid, without a table.

Each channel is rounded on its own, and an id is the channels' level numbers in a mixed radix,
computed in int64. There is nothing to search and nothing to collapse. As residual levels grids get
finer: each is as much smaller as the one before it has values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.core.gradient import straight_through
from simvq_moe.quantizers.codebook import Quantizer


class Grid(Quantizer):
    """A quantizer whose codes follow from their ids."""

    def __init__(self, codes: int, width: int, **options: Any) -> None:
        super().__init__(codes, width, **options)
        self.precision = torch.get_default_dtype()
        """Precision of the codes; no tensor has it, so that casts of the module are followed."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.precision = fn(torch.empty(0, dtype=self.precision)).dtype
        return super()._apply(fn, recurse)

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        return self.lookup(torch.arange(self.codes, device=self.counter.counts.device), dtype)

    def lookup_padded(self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None) -> Tensor:
        """As `lookup`, with 0 for ids below 0.

        Raises:
            IndexError: an id is none of a code, which a table would say, but not arithmetic.
        """
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            largest = int(ids.max()) if ids.numel() else 0
            if largest >= self.codes:
                raise IndexError(f"id {largest} of {self.codes} codes: give 0 to {self.codes - 1}")
        return super().lookup_padded(ids, dtype)

    def pass_gradient(
        self, z: Float[Tensor, "tokens width"], e: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, "tokens width"]:
        return straight_through(z, e)
