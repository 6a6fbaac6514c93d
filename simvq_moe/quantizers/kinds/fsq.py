"""Finite scalar quantization: a grid of any number of values a channel (FSQ, arXiv:2309.15505)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.ranges import Range
from simvq_moe.config.registry import register
from simvq_moe.core.search.nearest import numbered
from simvq_moe.quantizers.base import AnyQuantizer, check_each_once
from simvq_moe.quantizers.options import LevelOptions
from simvq_moe.quantizers.parts.grid import Grid


class FSQ(Grid):
    """Finite scalar quantization: channel i is bounded by tanh and rounded to `levels[i]` values.

    It has no loss of its own. Codes lie in [-1, 1].

    Several of them as residual levels are vector-quantize-pytorch's ResidualFSQ: values lie evenly
    in [-s, s] with s = 1, then 1 / levels, 1 / levels^2, ..., so that a level covers a cell of the
    one before it. The first tanh is wide enough to leave the outermost cells whole.

    Args:
        levels: number of values of each channel; the width is their number.
        channels_first: latents are (batch, width, ...) instead of (..., width).
    """

    levels: Tensor
    radix: Tensor
    cells: Tensor | None
    """int64 (width,): 1 / s of a residual level; None: a quantizer by itself."""

    def __init__(self, levels: Sequence[int], *, channels_first: bool = False) -> None:
        if not levels or min(levels) < 2:
            raise ValueError(f"levels {list(levels)}: each channel needs at least 2 values")
        super().__init__(prod(levels), len(levels), channels_first=channels_first)
        self.values = list(levels)
        radix = [prod(levels[:i]) for i in range(len(levels))]
        self.hold("levels", partial(torch.tensor, self.values))
        self.hold("radix", partial(torch.tensor, radix))
        self.cells = None
        self.is_first_level = False

    def join(self, levels: Sequence[AnyQuantizer], place: int) -> None:
        grids = [level for level in levels if isinstance(level, FSQ)]
        if len(grids) > 1:
            check_each_once(levels, self)
            before = [level for level in levels[:place] if isinstance(level, FSQ)]
            cells = [prod(grid.values[i] for grid in before) for i in range(self.width)]
            self.hold("cells", partial(torch.tensor, cells))
            self.is_first_level = place == 0

    def target(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        if not self.is_first_level:
            return z
        bound = self.levels.to(z.dtype) / (self.levels - 1)
        return torch.tanh(z / bound) * bound

    def prepare(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        if self.cells is None:
            return self._bounded(z) / (self.levels // 2)
        scale = 1 / self.cells.to(z.dtype)
        return z.clamp(-scale, scale)

    def assign(self, z: Float[Tensor, "tokens width"]) -> Int[Tensor, " tokens"]:
        if self.cells is None:
            inside = self._bounded(z)
            number = inside.round().long() + self.levels // 2
        else:
            inside = (z * self.cells).clamp(-1, 1)
            number = ((self.levels - 1) * (inside + 1) / 2 + 0.5).floor().long()
        # tanh saturates half a thousandth outside, which is a level of its own beyond 1,000
        number = torch.minimum(number.clamp_min(0), self.levels - 1)
        return numbered((number * self.radix).sum(-1), inside)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        dtype = dtype or self.precision
        number = ids[..., None] // self.radix % self.levels
        if self.cells is None:
            half = self.levels // 2
            return (number - half).to(dtype) / half
        return (number.to(dtype) * 2 / (self.levels - 1) - 1) / self.cells

    def losses(
        self,
        z: Float[Tensor, "tokens width"],
        e: Float[Tensor, "tokens width"],
    ) -> dict[str, Tensor]:
        del z, e
        return {}

    def _bounded(self, z: Tensor) -> Tensor:
        """tanh scaled so that rounding gives `levels` integers; an even number lies off centre.

        Of two values the bound is the paper's (appendix A.1), a little inside of the integers and
        shifted by a tangent: a little outside, the second value would need |z| > 3.8.
        """
        two, steps = self.levels == 2, (self.levels - 1).to(z.dtype)
        half = torch.where(two, steps * (1 - 1e-3) / 2, steps * (1 + 1e-3) / 2)
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0).to(z.dtype)
        ratio = offset / half
        shift = torch.where(two, torch.tan(ratio), torch.atanh(torch.where(two, 0, ratio)))
        return torch.tanh(z + shift) * half - offset


@register
@dataclass(frozen=True)
class FSQOptions(LevelOptions):
    """A grid of `levels` values a channel, without a table (2309.15505)."""

    quantizer = FSQ
    kind: Literal["fsq"] = "fsq"
    levels: tuple[Annotated[int, Range(2, 2**16)], ...] = ()
    """Values of each channel; width is their number and codes their product."""

    @classmethod
    def example(cls) -> FSQOptions:
        return cls(levels=(8, 8, 8), width=3, codes=512)

    def arguments(self) -> dict[str, Any]:
        return {"levels": self.levels}

    def problems(self, at: str, config: Any) -> Iterator[str]:
        yield from super().problems(at, config)
        if not self.levels:
            yield (
                f"{at}.levels () with {at}.kind 'fsq': give values of each channel, such as "
                f"--{at}.levels 8 8 8 --{at}.width 3 --{at}.codes 512"
            )
        if (len(self.levels), prod(self.levels)) != (self.width, self.codes):
            yield (
                f"{at}.levels {self.levels} need {at}.width {len(self.levels)} and {at}.codes "
                f"{prod(self.levels)}, not {self.width} and {self.codes}"
            )
