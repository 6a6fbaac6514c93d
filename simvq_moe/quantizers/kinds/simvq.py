"""SimVQ: one linear map shared by all codes ends codebook collapse (arXiv:2411.02038)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.quantizer import QuantizerOptions
from simvq_moe.config.ranges import Channels
from simvq_moe.config.registry import register
from simvq_moe.core.bank import Bank, Transform
from simvq_moe.core.choices import check_choice, check_none
from simvq_moe.core.collectives import copy_from_rank_0
from simvq_moe.core.moments import moments
from simvq_moe.core.search.nearest import nearest
from simvq_moe.quantizers.codebook import Quantizer, random_codebook
from simvq_moe.quantizers.kinds.vq import VQ, VQOptions, plain_vq
from simvq_moe.quantizers.options import CodebookOptions, shared_fields

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
        check_none(init_problems(init, transform))
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
        return plain_vq(self, self.bank.fold())


def init_problems(init: str, transform: Transform, at: str = "") -> Iterator[str]:
    """A start from data of a map that there is not."""
    if init == "data" and transform == "none":
        yield f"{at}init 'data' sets W, but {at}transform 'none' has none: use 'linear'"


@register
@dataclass(frozen=True)
class SimVQOptions(CodebookOptions):
    """Frozen rows under one learned map, which moves all codes in every step (2411.02038)."""

    quantizer = SimVQ
    kind: Literal["simvq"] = "simvq"
    transform: Literal["none", "diagonal", "linear"] = "linear"
    """Shape of the shared map W."""
    train_base: bool = False
    """Learn the base rows beside W."""
    bias: bool = False
    """One learned shift of all codes."""
    base_width: Channels | None = None
    """Channels of a base row; None: width."""
    init: Literal["default", "data"] = "default"
    """data: W and a bias start from the covariance and mean of the first batch."""

    def folded(self) -> QuantizerOptions:
        return VQOptions(**shared_fields(self, CodebookOptions))

    def problems(self, at: str, config: Any) -> Iterator[str]:
        yield from super().problems(at, config)
        if self.transform != "linear" and self.base_width not in (None, self.width):
            yield (
                f"{at}.base_width {self.base_width} != {at}.width {self.width} with {at}.transform "
                f"{self.transform!r}: only 'linear' changes the width"
            )
        yield from init_problems(self.init, self.transform, f"{at}.")
