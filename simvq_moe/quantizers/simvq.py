"""SimVQ: one linear map shared by all codes ends codebook collapse (arXiv:2411.02038)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.core.bank import Bank, Transform
from simvq_moe.quantizers.base import Quantizer, random_codebook
from simvq_moe.quantizers.vq import VQ


class SimVQ(Quantizer):
    """Codes q @ W (+ b): rows q ~ N(0, 1/base_width) are frozen, the map W learns for all of them.

    Args:
        codes: number of codes.
        width: channels of a code.
        transform: "linear" W (the paper's), "diagonal" W, or "none".
        train_base: learn q beside W.
        bias: one learned shift of all codes (the authors' published code has it, the paper's
            equation does not).
        base_width: channels of q; None: `width`.
        options: `gradient`, `codebook_weight` (beta), `commitment_weight` (gamma) of `Quantizer`.
    """

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        transform: Transform = "linear",
        train_base: bool = False,
        bias: bool = False,
        base_width: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(codes, width, **options)
        self.bank = Bank(
            random_codebook(codes, base_width or width),
            width=width,
            transform=transform,
            train_base=train_base,
            bias=bias,
        )

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        return self.bank.rows(dtype)

    def decode(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        return self.bank.lookup(ids, dtype)

    def fold(self) -> VQ:
        """A plain VQ with the same codes: W and the bias are merged into the rows."""
        folded = VQ(self.codes, self.width)
        folded.estimator, folded.weights = self.estimator, dict(self.weights)
        folded.bank = self.bank.fold()
        return folded.train(self.training)
