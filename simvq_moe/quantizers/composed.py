"""Quantizers made of quantizers: residual levels (SoundStream, arXiv:2107.03312), heads side by
side (product quantization), and a projection to a narrow code (VQGAN-FC, arXiv:2110.04627)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import reduce
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from simvq_moe.core.bank import wide
from simvq_moe.core.choices import check_choice
from simvq_moe.core.gradient import ESTIMATORS
from simvq_moe.core.step_state import one_step
from simvq_moe.quantizers.base import PADDING, AnyQuantizer, Quantized
from simvq_moe.quantizers.codebook import Quantizer

ResidualGradient = Literal["straight_through", "rotation"]


class _Outer(AnyQuantizer):
    """A quantizer made of others, which hands on to them what it is called with."""

    luck: Tensor | None = None
    """(tokens, 2): two uniform numbers of the item that each row is of, where `drops` in a pass of
    training; None elsewhere."""
    shares = False
    """Whether one codebook is of several parts, so that a forward pass meets it as often."""

    @abstractmethod
    def __iter__(self) -> Iterator[AnyQuantizer]:
        """The quantizers that it is made of."""

    @property
    def waits_for_data(self) -> bool:
        return any(part.waits_for_data for part in self)

    @property
    def drops(self) -> bool:
        """Whether items skip levels at random in training."""
        return any(isinstance(part, _Outer) and part.drops for part in self)

    def forward(
        self, z: Float[Tensor, "*latents"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> Quantized:
        if not self.training:
            return super().forward(z, mask)
        self.luck = self._luck_of_items(z, mask) if self.drops else None
        try:
            with one_step(self) if self.shares else nullcontext():
                return super().forward(z, mask)
        finally:
            self.luck = None

    def _luck_of_items(self, z: Tensor, mask: Tensor | None) -> Float[Tensor, "tokens 2"]:
        lead = (z.shape[0], *z.shape[2:]) if self.channels_first else z.shape[:-1]
        luck = torch.rand(lead[0] if lead else 1, 2, device=z.device)
        luck = luck.view(-1, *[1] * (len(lead) - 1), 2).expand(*(lead or (1,)), 2)
        return luck.reshape(-1, 2) if mask is None else luck[mask]

    def _quantize_part(
        self, part: AnyQuantizer, z: Tensor, rows: Bool[Tensor, " tokens"] | None = None
    ) -> Quantized:
        """What a part makes of its latents, which are of some rows, or of all."""
        if self.luck is None or not isinstance(part, _Outer):
            return part.quantize(z)
        part.luck = self.luck if rows is None else self.luck[rows]
        try:
            return part.quantize(z)
        finally:
            part.luck = None


class _Composed(_Outer):
    """Several quantizers, each with its own codebook and usage; ids gain an axis for them."""

    def __init__(
        self, parts: Sequence[AnyQuantizer], width: int, *, channels_first: bool = False
    ) -> None:
        super().__init__(width, channels_first=channels_first)
        if len({part.id_axes for part in parts}) != 1:
            raise ValueError(
                "parts must all give as many ids a token: give one or more, plain or nested ones"
            )
        self.parts = nn.ModuleList(parts)
        self.id_axes = parts[0].id_axes + 1
        modules = [module for part in parts for module in part.modules()]
        nested = any(isinstance(part, _Outer) and part.shares for part in parts)
        self.shares = nested or len(set(modules)) < len(modules)

    def __iter__(self) -> Iterator[AnyQuantizer]:
        for part in self.parts:
            assert isinstance(part, AnyQuantizer)
            yield part

    def lookup_padded(self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None) -> Tensor:
        return self.lookup(ids, dtype)  # each part has ids of its own

    def _codes(self, ids: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
        """The codes of each part, of the first ones alone where ids are of these, all in `dtype`.

        None: in the widest that a part stores, for averages are wider than weights of 16 bits.
        """
        each = list(zip(self, ids.unbind(-self.id_axes), strict=False))
        codes = [part.lookup_padded(x, dtype) for part, x in each]
        widest = reduce(torch.promote_types, (code.dtype for code in codes))
        if any(code.dtype != widest for code in codes):
            codes = [part.lookup_padded(x, widest) for part, x in each]
        return codes


class ResidualQuantizer(_Composed):
    """Levels that each quantize what the levels before them left over; the output is their sum.

    Every level's losses reach the latents. The gradient of the output reaches them once, from the
    sum of all levels, and the levels' own estimators are not used. Grids (FSQ, LFQ) get finer from
    level to level, as in vector-quantize-pytorch. `decode` also takes the ids of the first levels
    alone.

    With `dropout` an item of a training batch, one place on the first axis, goes through its first
    n levels alone, n uniform from 1 on (SoundStream; as in DAC, arXiv:2306.06546, section 3.2, with
    a probability). What it skips gives it no loss, takes no latent of it into its statistics and
    has the id `PADDING`. Shapes then depend on the draw, which a compiler can't follow.

    Args:
        levels: quantizers of one width, the coarsest first.
        gradient: how the gradient of the output reaches the latents.
        dropout: probability that an item goes through a random number of levels in training.
        channels_first: latents are (batch, width, ...) instead of (..., width).

    Raises:
        ValueError: there is no level, widths differ, or a level can't refine others.
    """

    def __init__(
        self,
        levels: Sequence[AnyQuantizer],
        *,
        gradient: ResidualGradient = "straight_through",
        dropout: float = 0.0,
        channels_first: bool = False,
    ) -> None:
        widths = [level.width for level in levels]
        if len(set(widths)) != 1:
            raise ValueError(f"levels of widths {widths}: give one or more levels of one width")
        check_choice("gradient", gradient, ResidualGradient)
        for place, level in enumerate(levels):
            level.join(levels, place)
        super().__init__(levels, widths[0], channels_first=channels_first)
        self.estimator = ESTIMATORS[gradient]
        self.dropout = dropout

    @property
    def levels(self) -> list[AnyQuantizer]:
        """As they are now."""
        return list(self)

    @property
    def drops(self) -> bool:
        return self.dropout > 0 or super().drops

    def quantize(self, z: Float[Tensor, "tokens width"]) -> Quantized:
        z = self._target(z)
        value = torch.zeros_like(z)
        outs: list[Quantized] = []
        shares: list[float] = []
        levels = self._levels_of_rows()
        for place, level in enumerate(self):
            rows = None if levels is None else levels > place
            left = z - value
            out = self._quantize_part(level, left if rows is None else left[rows], rows)
            shares.append(1.0 if rows is None else len(out.ids) / max(len(z), 1))
            out = out if rows is None else _of_rows(out, rows)
            # detached: the next level's commitment loss must reach z, not cancel against this one
            value = value + out.z_q.detach()
            outs.append(out)
        ids = torch.stack([out.ids for out in outs], 1)
        return Quantized(self.estimator(z, value), ids, *_sum_of_losses(outs, shares))

    def assign(self, z: Float[Tensor, "tokens width"]) -> Int[Tensor, "tokens ..."]:
        z = self._target(z)
        value = torch.zeros_like(z)
        ids: list[Tensor] = []
        for level in self:
            ids.append(level.assign(z - value))
            value = value + level.lookup(ids[-1], z.dtype)
        return torch.stack(ids, 1)

    def lookup(self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None) -> Tensor:
        if (levels := ids.shape[-self.id_axes]) > len(self.parts):
            raise ValueError(f"ids of {levels} levels, but there are {len(self.parts)}")
        codes = self._codes(ids, dtype)
        return sum(codes[1:], start=codes[0])

    def fit(self, z: Float[Tensor, "tokens width"]) -> None:
        z = self._target(z)
        for level in self:
            level.initialize(z)
            z = z - level.lookup(level.assign(z), z.dtype)

    def _levels_of_rows(self) -> Int[Tensor, " tokens"] | None:
        """How many levels each row of this forward pass goes through; None: all."""
        if self.luck is None or not self.dropout:
            return None
        skips, number = self.luck.unbind(1)
        drawn = 1 + (number * len(self.parts)).long().clamp_max(len(self.parts) - 1)
        return torch.where(skips < self.dropout, drawn, len(self.parts))

    def _target(self, z: Tensor) -> Tensor:
        return next(iter(self)).target(z)


class GroupedQuantizer(_Composed):
    """Heads that each quantize their own share of the channels; outputs are put side by side.

    Losses are means over all channels: a head counts by its width.

    Args:
        heads: quantizers whose widths add up to the width of the latents.
        channels_first: latents are (batch, width, ...) instead of (..., width).
    """

    def __init__(self, heads: Sequence[AnyQuantizer], *, channels_first: bool = False) -> None:
        widths = [head.width for head in heads]
        super().__init__(heads, sum(widths), channels_first=channels_first)
        self.widths = widths

    @property
    def heads(self) -> list[AnyQuantizer]:
        """As they are now."""
        return list(self)

    def quantize(self, z: Float[Tensor, "tokens width"]) -> Quantized:
        outs = [self._quantize_part(head, share) for head, share in self._shares(z)]
        ids = torch.stack([out.ids for out in outs], 1)
        weights = [width / self.width for width in self.widths]
        return Quantized(
            torch.cat([out.z_q for out in outs], -1), ids, *_sum_of_losses(outs, weights)
        )

    def assign(self, z: Float[Tensor, "tokens width"]) -> Int[Tensor, "tokens ..."]:
        return torch.stack([head.assign(share) for head, share in self._shares(z)], 1)

    def lookup(self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None) -> Tensor:
        if (heads := ids.shape[-self.id_axes]) != len(self.parts):
            raise ValueError(f"ids of {heads} heads, but there are {len(self.parts)}")
        return torch.cat(self._codes(ids, dtype), -1)

    def fit(self, z: Float[Tensor, "tokens width"]) -> None:
        for head, share in self._shares(z):
            head.initialize(share)

    def join(self, levels: Sequence[AnyQuantizer], place: int) -> None:
        alike = [
            level
            for level in levels
            if isinstance(level, GroupedQuantizer) and level.widths == self.widths
        ]
        place = sum(any(level is other for other in alike) for level in levels[:place])
        for heads in zip(*alike, strict=True):
            heads[place].join(heads, place)

    def target(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        return torch.cat([head.target(share) for head, share in self._shares(z)], -1)

    def _shares(self, z: Tensor) -> list[tuple[AnyQuantizer, Tensor]]:
        return list(zip(self, z.split(self.widths, -1), strict=True))


class Projected(_Outer):
    """A quantizer of another width between two learned linear maps, in and out.

    One of several levels or heads has no `codes`, `codebook` and `usage` of its own: its parts do.

    Args:
        inner: the quantizer; its width is that of the codes.
        width: channels of the latents.
        channels_first: latents are (batch, width, ...) instead of (..., width).
    """

    def __init__(self, inner: AnyQuantizer, width: int, *, channels_first: bool = False) -> None:
        super().__init__(width, channels_first=channels_first)
        self.inner = inner
        self.id_axes = inner.id_axes
        self.shares = isinstance(inner, _Outer) and inner.shares
        self.project_in = nn.Linear(width, inner.width)
        self.project_out = nn.Linear(inner.width, width)

    def __iter__(self) -> Iterator[AnyQuantizer]:
        yield self.inner

    @property
    def codes(self) -> int:
        """Number of codes of the inner codebook."""
        return self._one_codebook().codes

    @property
    def usage(self) -> Int[Tensor, " codes"]:
        """int64: draws of each code of the inner codebook since the window began."""
        return self._one_codebook().usage

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        """Every code, projected out."""
        inner = self._one_codebook()
        dtype = dtype or inner.codebook().dtype
        return _apply(self.project_out, inner.codebook(wide(dtype))).to(dtype)

    def _one_codebook(self) -> Quantizer:
        if not isinstance(self.inner, Quantizer):
            name = type(self.inner).__name__
            raise ValueError(f"a projected {name} has several codebooks: ask its parts in `inner`")
        return self.inner

    def quantize(self, z: Float[Tensor, "tokens width"]) -> Quantized:
        out = self._quantize_part(self.inner, _apply(self.project_in, z))
        return out._replace(z_q=_apply(self.project_out, out.z_q))

    def assign(self, z: Float[Tensor, "tokens width"]) -> Int[Tensor, "tokens ..."]:
        return self.inner.assign(_apply(self.project_in, z))

    def lookup(self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None) -> Tensor:
        return _apply(self.project_out, self.inner.lookup_padded(ids, dtype))

    def lookup_padded(self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None) -> Tensor:
        none = (ids < 0).flatten(-self.id_axes).all(-1) if self.id_axes else ids < 0
        return self.lookup(ids, dtype).masked_fill(none[..., None], 0)

    def fit(self, z: Float[Tensor, "tokens width"]) -> None:
        self.inner.initialize(_apply(self.project_in, z))


def _of_rows(out: Quantized, rows: Bool[Tensor, " tokens"]) -> Quantized:
    """What some of the rows were quantized to, and nothing for the others."""
    z_q = out.z_q.new_zeros(len(rows), *out.z_q.shape[1:])
    ids = out.ids.new_full((len(rows), *out.ids.shape[1:]), PADDING)
    z_q[rows], ids[rows] = out.z_q.detach(), out.ids
    return out._replace(z_q=z_q, ids=ids)


def _apply(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _sum_of_losses(
    outs: Sequence[Quantized], weights: Sequence[float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total, and each term by name summed over the parts that have it."""
    terms: dict[str, Tensor] = {}
    for out, weight in zip(outs, weights, strict=True):
        for name, term in out.losses.items():
            terms[name] = terms[name] + weight * term if name in terms else weight * term
    total = torch.stack([w * out.loss for out, w in zip(outs, weights, strict=True)]).sum()
    return total, terms
