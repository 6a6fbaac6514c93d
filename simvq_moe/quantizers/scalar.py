"""Codebooks without a table: FSQ (arXiv:2309.15505), LFQ (arXiv:2310.05737), BSQ (2406.07548).

A code is a grid point: each channel is rounded on its own, and an id is the channels' level
numbers in a mixed radix, computed in int64. There is nothing to search and nothing to collapse;
LFQ and BSQ spread their codes by an entropy term instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.core.gradient import straight_through
from simvq_moe.core.nearest import numbered
from simvq_moe.quantizers.base import Quantizer, mean_squared_error
from simvq_moe.quantizers.ranks import differentiable_total, total
from simvq_moe.quantizers.vq import to_sphere


class _Grid(Quantizer):
    """A quantizer whose codes follow from their ids."""

    one: Tensor

    def __init__(self, codes: int, width: int, **options: Any) -> None:
        super().__init__(codes, width, **options)
        # nothing else is stored that a change of the module's precision would change
        self.register_buffer("one", torch.ones(()), persistent=False)

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        return self.lookup(torch.arange(self.codes, device=self.counter.counts.device), dtype)

    def pass_gradient(
        self, z: Float[Tensor, "tokens width"], e: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, "tokens width"]:
        return straight_through(z, e)


class FSQ(_Grid):
    """Finite scalar quantization: channel i is bounded by tanh and rounded to `levels[i]` values.

    It has no loss of its own. Codes lie in [-1, 1].

    Args:
        levels: number of values of each channel; the width is their number.
        channels_first: latents are (batch, width, ...) instead of (..., width).
    """

    levels: Tensor
    radix: Tensor

    def __init__(self, levels: Sequence[int], *, channels_first: bool = False) -> None:
        if min(levels) < 2:
            raise ValueError(f"levels {list(levels)}: each channel needs at least 2 values")
        super().__init__(prod(levels), len(levels), channels_first=channels_first)
        radix = [prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(list(levels)), persistent=False)
        self.register_buffer("radix", torch.tensor(radix), persistent=False)

    def prepare(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        return self._bounded(z) / (self.levels // 2)

    def assign(self, z: Float[Tensor, "tokens width"]) -> Int[Tensor, " tokens"]:
        number = self._bounded(z).round().long() + self.levels // 2
        # tanh saturates half a thousandth outside, which is a level of its own beyond 1,000
        number = torch.minimum(number.clamp_min(0), self.levels - 1)
        return numbered((number * self.radix).sum(-1), z)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        half = self.levels // 2
        number = ids[..., None] // self.radix % self.levels
        return (number - half).to(dtype or self.one.dtype) / half

    def losses(
        self,
        z: Float[Tensor, "tokens width"],
        e: Float[Tensor, "tokens width"],
    ) -> dict[str, Tensor]:
        del z, e
        return {}

    def _bounded(self, z: Tensor) -> Tensor:
        """tanh scaled so that rounding gives `levels` integers; an even number lies off centre."""
        half = (self.levels - 1).to(z.dtype) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0).to(z.dtype)
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset


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
        self.register_buffer("powers", 2 ** torch.arange(width - 1, -1, -1), persistent=False)

    @property
    def scale(self) -> float:
        """Absolute value of a code's channels."""
        return 1.0

    def assign(self, z: Float[Tensor, "tokens width"]) -> Int[Tensor, " tokens"]:
        return numbered(((z > 0) * self.powers).sum(-1), z)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        bits = (ids[..., None] & self.powers) != 0
        return (bits.to(dtype or self.one.dtype) * 2 - 1) * self.scale

    def losses(
        self, z: Float[Tensor, "tokens width"], e: Float[Tensor, "tokens width"]
    ) -> dict[str, Tensor]:
        # log odds of each bit: 2 z c / temperature for c = +scale against -scale
        logits = 4 * self.scale * z / self.temperature
        token = (F.softplus(logits) - logits * logits.sigmoid()).sum() / max(len(z), 1)
        return {
            "commitment": mean_squared_error(z, e.detach()),
            "token_entropy": token,
            "codebook_entropy": self._mean_assignment_entropy(logits),
        }

    def _mean_assignment_entropy(self, logits: Tensor) -> Tensor:
        upper, lower = logits.tensor_split([self.width // 2], dim=1)
        # p(c | z) is a product of its halves' probabilities, so its mean is a matrix product
        summed, tokens = _patterns(upper).T @ _patterns(lower), logits.new_tensor(len(logits))
        if self.training:  # in evaluation ranks may have different numbers of batches
            summed, tokens = differentiable_total(summed), total(tokens)
        # the slope of -p log p at 0 is infinite, and the probability of a far code underflows to 0
        mean = (summed / tokens.clamp_min(1)).clamp_min(torch.finfo(summed.dtype).tiny)
        return torch.special.entr(mean).sum()


def _patterns(logits: Float[Tensor, "tokens bits"]) -> Float[Tensor, "tokens patterns"]:
    """Probability of each pattern of independent bits, in the order of its number."""
    joint = logits.new_ones(len(logits), 1)
    for bit in logits.unbind(1):
        odds = torch.stack([(-bit).sigmoid(), bit.sigmoid()], 1)
        joint = (joint[:, :, None] * odds[:, None, :]).flatten(1)
    return joint


class BSQ(LFQ):
    """Binary spherical quantization: latents on the unit sphere, codes of +-1/sqrt(width).

    The arguments are those of `LFQ`.
    """

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def prepare(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        return to_sphere(z)
