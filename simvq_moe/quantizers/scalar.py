"""Codebooks without a table: FSQ (arXiv:2309.15505), LFQ (arXiv:2310.05737), BSQ (2406.07548).

A code is a grid point: each channel is rounded on its own, and an id is the channels' level
numbers in a mixed radix, computed in int64. There is nothing to search and nothing to collapse;
LFQ and BSQ spread their codes by an entropy term instead.

As residual levels grids get finer: each is as much smaller as the one before it has values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.core.collectives import mean_assignment_entropy
from simvq_moe.core.gradient import straight_through
from simvq_moe.core.nearest import numbered
from simvq_moe.quantizers.base import (
    AnyQuantizer,
    Quantizer,
    check_each_once,
    mean_squared_error,
    refuse_behind_others,
)
from simvq_moe.quantizers.vq import to_sphere


class _Grid(Quantizer):
    """A quantizer whose codes follow from their ids."""

    def __init__(self, codes: int, width: int, **options: Any) -> None:
        super().__init__(codes, width, **options)
        self.precision = torch.get_default_dtype()
        """Of its codes; no tensor with it is stored, so that it follows the module's by itself."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.precision = fn(torch.empty(0, dtype=self.precision)).dtype
        return super()._apply(fn, recurse)

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        return self.lookup(torch.arange(self.codes, device=self.counter.counts.device), dtype)

    def pass_gradient(
        self, z: Float[Tensor, "tokens width"], e: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, "tokens width"]:
        return straight_through(z, e)


class FSQ(_Grid):
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
    scale: Tensor | None
    """(width,): s of a residual level; None: a quantizer by itself."""

    def __init__(self, levels: Sequence[int], *, channels_first: bool = False) -> None:
        if not levels or min(levels) < 2:
            raise ValueError(f"levels {list(levels)}: each channel needs at least 2 values")
        super().__init__(prod(levels), len(levels), channels_first=channels_first)
        self.values = list(levels)
        radix = [prod(levels[:i]) for i in range(len(levels))]
        self.hold("levels", partial(torch.tensor, self.values))
        self.hold("radix", partial(torch.tensor, radix))
        self.scale = None
        self.is_first_level = False

    def join(self, levels: Sequence[AnyQuantizer], place: int) -> None:
        grids = [level for level in levels if isinstance(level, FSQ)]
        if len(grids) > 1:
            check_each_once(levels, self)
            before = [level for level in levels[:place] if isinstance(level, FSQ)]
            cells = [prod(grid.values[i] for grid in before) for i in range(self.width)]
            self.hold("scale", partial(torch.tensor, [1 / number for number in cells]))
            self.is_first_level = place == 0

    def target(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        if not self.is_first_level:
            return z
        bound = (self.levels / (self.levels - 1)).to(z.dtype)
        return torch.tanh(z / bound) * bound

    def prepare(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        if self.scale is None:
            return self._bounded(z) / (self.levels // 2)
        scale = self.scale.to(z.dtype)
        return z.clamp(-scale, scale)

    def assign(self, z: Float[Tensor, "tokens width"]) -> Int[Tensor, " tokens"]:
        if self.scale is None:
            number = self._bounded(z).round().long() + self.levels // 2
        else:
            inside = (z / self.scale.to(z.dtype)).clamp(-1, 1)
            number = ((self.levels - 1) * (inside + 1) / 2 + 0.5).floor().long()
        # tanh saturates half a thousandth outside, which is a level of its own beyond 1,000
        number = torch.minimum(number.clamp_min(0), self.levels - 1)
        return numbered((number * self.radix).sum(-1), z)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        dtype = dtype or self.precision
        number = ids[..., None] // self.radix % self.levels
        if self.scale is None:
            half = self.levels // 2
            return (number - half).to(dtype) / half
        return (number.to(dtype) * 2 / (self.levels - 1) - 1) * self.scale.to(dtype)

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


class LFQ(_Grid):
    """Lookup-free quantization: a code is the sign of each channel; 2^width codes of +-1.

    Two entropies, in nats, of the soft assignment p(c | z) ~ exp(2 z · c / temperature) join the
    commitment loss: that of each token shall be low, that of the mean over all tokens high. The
    assignment factorizes over channels, so both are exact without a tokens x codes matrix.

    Args:
        width: channels, one bit of the id each, the first the highest.
        temperature: softness of the assignment.
        entropy_weight: weight of the token entropy.
        diversity_weight: weight of the entropy of the mean assignment, relative to the former.
        commitment_weight: gamma, weight of |z - sg e|^2.
        channels_first: latents are (batch, width, ...) instead of (..., width).
    """

    powers: Tensor

    def __init__(
        self,
        width: int,
        *,
        temperature: float = 0.01,
        entropy_weight: float = 0.1,
        diversity_weight: float = 1.0,
        commitment_weight: float = 0.25,
        channels_first: bool = False,
    ) -> None:
        super().__init__(
            2**width, width, commitment_weight=commitment_weight, channels_first=channels_first
        )
        self.temperature = temperature
        self.weights |= {
            "token_entropy": entropy_weight,
            "codebook_entropy": -entropy_weight * diversity_weight,
        }
        self.hold("powers", partial(torch.tensor, [2**bit for bit in range(width - 1, -1, -1)]))
        self.halvings = 0
        """Levels before this one, where it is a residual level."""

    @property
    def scale(self) -> float:
        """Absolute value of a code's channels."""
        return 2.0**-self.halvings

    def join(self, levels: Sequence[AnyQuantizer], place: int) -> None:
        check_each_once(levels, self)
        self.halvings = sum(isinstance(level, LFQ) for level in levels[:place])

    def assign(self, z: Float[Tensor, "tokens width"]) -> Int[Tensor, " tokens"]:
        return numbered(((z > 0) * self.powers).sum(-1), z)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        bits = (ids[..., None] & self.powers) != 0
        return (bits.to(dtype or self.precision) * 2 - 1) * self.scale

    def losses(
        self, z: Float[Tensor, "tokens width"], e: Float[Tensor, "tokens width"]
    ) -> dict[str, Tensor]:
        # log odds of each bit: 2 z c / temperature for c = +scale against -scale
        logits = 4 * self.scale * z / self.temperature
        token = (F.softplus(logits) - logits * logits.sigmoid()).sum() / max(len(z), 1)
        upper, lower = logits.tensor_split([self.width // 2], dim=1)
        # p(c | z) is a product of its halves' probabilities, so its mean is a matrix product
        summed = _patterns(upper).T @ _patterns(lower)
        return {
            "commitment": mean_squared_error(z, e.detach()),
            "token_entropy": token,
            "codebook_entropy": mean_assignment_entropy(summed, len(z), all_ranks=self.training),
        }


def _patterns(logits: Float[Tensor, "tokens bits"]) -> Float[Tensor, "tokens patterns"]:
    """Probability of each pattern of independent bits, in the order of its number."""
    joint = logits.new_ones(len(logits), 1)
    for bit in logits.unbind(1):
        odds = torch.stack([(-bit).sigmoid(), bit.sigmoid()], 1)
        joint = (joint[:, :, None] * odds[:, None, :]).flatten(1)
    return joint


class BSQ(LFQ):
    """Binary spherical quantization: latents on the unit sphere, codes of +-1/sqrt(width).

    The arguments are those of `LFQ`. It is no residual level behind another, for its codes are all
    of length 1.
    """

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def join(self, levels: Sequence[AnyQuantizer], place: int) -> None:
        refuse_behind_others(self, levels, place)

    def prepare(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        return to_sphere(z)
