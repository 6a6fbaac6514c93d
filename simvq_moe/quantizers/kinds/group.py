"""SimVQ with a map for each group of codes (Group-VQ, arXiv:2510.13331)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.ranges import Range
from simvq_moe.config.registry import register
from simvq_moe.core.bank import Bank, wide
from simvq_moe.core.choices import check_choice, check_none
from simvq_moe.core.collectives import copy_from_rank_0
from simvq_moe.core.moments import moments
from simvq_moe.core.search.nearest import nearest
from simvq_moe.quantizers.codebook import Quantizer, random_codebook
from simvq_moe.quantizers.kinds.simvq import MapInit
from simvq_moe.quantizers.options import CodebookOptions


class GroupVQ(Quantizer):
    """SimVQ with one map W_g and bias b_g for each contiguous group of codes.

    Args:
        codes: number of codes, a multiple of `groups`.
        width: channels of a code.
        groups: number of maps.
        init: "identity": every W_g starts as the identity; "data": every group starts with the
            covariance and mean of the first batch over all ranks, as SimVQ does, so that both
            start from the same codes. Groups then differ by their base rows alone, independent
            draws, and part as each map learns from the latents that its own codes win.
        options: those of `Quantizer`.
    """

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        groups: int,
        init: MapInit = "identity",
        **options: Any,
    ) -> None:
        super().__init__(codes, width, **options)
        check_choice("init", init, MapInit)
        check_none(group_problems(codes, groups))
        base = random_codebook(codes, width).unflatten(0, (groups, -1))
        self.bank = Bank(base, transform="separate", train_base=False, bias=True)
        if init == "data":
            self._wait_for_data()

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        return self.bank.rows(dtype).flatten(0, 1)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        assert self.bank.W is not None
        assert self.bank.bias is not None
        dtype = dtype or self.bank.base.dtype
        flat = ids.reshape(-1)
        group = flat // self.bank.base.shape[1]
        rows = self.bank.base.flatten(0, 1)[flat].to(wide(dtype))
        rows = map_by_group(rows, group, self.bank.W) + self.bank.bias.to(rows.dtype)[group]
        return rows.reshape((*ids.shape, self.width)).to(dtype)

    def assign(self, z: Float[Tensor, "tokens width"]) -> Int[Tensor, " tokens"]:
        return nearest(z, self.bank.base.flatten(0, 1), W=self.bank.W, bias=self.bank.bias)

    def fit(self, z: Float[Tensor, "tokens width"]) -> None:
        assert self.bank.W is not None
        assert self.bank.bias is not None
        single = Bank(self.bank.base[0], train_base=False, bias=True)
        single.match(*moments(z))
        assert single.W is not None
        assert single.bias is not None
        self.bank.W.copy_(single.W)
        self.bank.bias.copy_(single.bias)
        for parameter in self.parameters():
            copy_from_rank_0(parameter)
        self._started()


def map_by_group(
    x: Float[Tensor, "tokens width"],
    group: Int[Tensor, " tokens"],
    maps: Float[Tensor, "groups width width"],
) -> Float[Tensor, "tokens width"]:
    """x_t @ maps[group_t], in (tokens + groups width) width^2 operations.

    Tokens are sorted into tiles of one group each, as many tiles as any grouping may need: shapes
    never depend on the data, and a tile of `width` tokens makes its map as large as itself.
    """
    groups, tile = len(maps), x.shape[1]
    number = torch.arange(len(x) // tile + groups, device=x.device)
    sizes = group.new_zeros(groups).index_add(0, group, torch.ones_like(group))
    needed = (sizes + tile - 1) // tile
    first_tile, first = needed.cumsum(0) - needed, sizes.cumsum(0) - sizes
    order = group.argsort(stable=True)
    by_group = group[order]
    within = torch.arange(len(x), device=x.device) - first[by_group]
    place = torch.empty_like(order).scatter(0, order, first_tile[by_group] * tile + within)
    packed = x.new_zeros(len(number) * tile, tile).index_copy(0, place, x)
    owner = torch.searchsorted(needed.cumsum(0), number, right=True).clamp_max(groups - 1)
    mapped = packed.unflatten(0, (-1, tile)) @ maps.to(x.dtype)[owner]
    return mapped.flatten(0, 1)[place]


def group_problems(codes: int, groups: int | None, at: str = "") -> Iterator[str]:
    """Codes that do not come in so many groups of one size."""
    if groups is None or groups < 1 or codes % groups:
        yield f"{at}groups {groups} must divide {at}codes {codes}: change either"


@register
@dataclass(frozen=True)
class GroupVQOptions(CodebookOptions):
    """Frozen rows, and a learned map for each block of them (Group-VQ, 2510.13331)."""

    quantizer = GroupVQ
    kind: Literal["group_vq"] = "group_vq"
    groups: Annotated[int, Range(1, 2**12)] | None = None
    """Number of blocks of codes, each with a map of its own; it must be set."""
    init: Literal["default", "data"] = "default"
    """data: maps and biases start from the covariance and mean of the first batch."""

    @classmethod
    def example(cls) -> GroupVQOptions:
        return cls(groups=4)

    def problems(self, at: str, config: Any) -> Iterator[str]:
        yield from super().problems(at, config)
        yield from group_problems(self.codes, self.groups, f"{at}.")
