"""SimVQ: one linear map shared by all codes ends codebook collapse (arXiv:2411.02038)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.core.bank import Bank, Transform
from simvq_moe.core.choices import check_choice
from simvq_moe.core.collectives import copy_from_rank_0, total
from simvq_moe.core.nearest import nearest
from simvq_moe.quantizers.base import Quantizer, random_codebook
from simvq_moe.quantizers.vq import VQ

MapInit = Literal["identity", "data"]


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
        init: "identity": W starts as the identity; "data": W and a bias start from the covariance
            and mean of the first batch over all ranks, which keeps codes alive where the latents
            are far from the origin or fill few dimensions.
        options: those of `Quantizer`.
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
        init: MapInit = "identity",
        **options: Any,
    ) -> None:
        super().__init__(codes, width, **options)
        check_choice("init", init, MapInit)
        if transform in ("low_rank", "separate"):
            raise ValueError(f"transform {transform!r} is for experts: use 'linear' or 'diagonal'")
        if init == "data" and transform == "none":
            raise ValueError("init 'data' sets W, but transform 'none' has none: use 'linear'")
        self.bank = Bank(
            random_codebook(codes, base_width or width),
            width=width,
            transform=transform,
            train_base=train_base,
            bias=bias or init == "data",
        )
        if init == "data":
            self._wait_for_data()

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        return self.bank.rows(dtype)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        return self.bank.lookup(ids, dtype)

    def assign(self, z: Float[Tensor, "tokens width"]) -> Int[Tensor, " tokens"]:
        if self.training or torch.compiler.is_compiling():
            return nearest(z, self.bank.base, W=self.bank.W, bias=self.bank.bias)
        return nearest(z, self.bank.folded_rows(z.dtype))

    def fit(self, z: Float[Tensor, "tokens width"]) -> None:
        mean, covariance = moments(z)
        self.bank.match(mean, covariance)
        for parameter in self.bank.parameters():
            copy_from_rank_0(parameter)
        self._started()

    def fold(self) -> VQ:
        """A plain VQ with the same codes: W and the bias are merged into the rows."""
        folded = VQ(
            self.codes,
            self.width,
            gradient=self.gradient,
            codebook_weight=self.weights["codebook"],
            commitment_weight=self.weights["commitment"],
            channels_first=self.channels_first,
        )
        folded.bank = self.bank.fold()
        return folded.train(self.training)


def moments(
    z: Float[Tensor, "tokens width"],
) -> tuple[Float[Tensor, " width"], Float[Tensor, "width width"]]:
    """Mean and covariance of the latents of all ranks, in float64."""
    z = z.double()
    tokens = total(torch.tensor(len(z), dtype=z.dtype, device=z.device))
    mean = total(z.sum(0)) / tokens
    centred = z - mean
    return mean, total(centred.T @ centred) / tokens
