"""Lookup-free quantization: a code is the sign of each channel (LFQ, arXiv:2310.05737).

Codes are spread by an entropy term.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.quantizer import Own
from simvq_moe.config.ranges import FACTOR, Range, Weight
from simvq_moe.config.registry import register
from simvq_moe.core.collectives import CALLS_OF_ENTROPY, mean_assignment_entropy
from simvq_moe.core.search.nearest import numbered
from simvq_moe.quantizers.base import AnyQuantizer, check_each_once
from simvq_moe.quantizers.codebook import mean_squared_error
from simvq_moe.quantizers.options import LevelOptions, bit_problems
from simvq_moe.quantizers.parts.grid import Grid


class LFQ(Grid):
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
    def summed_numbers(self) -> int:
        return 2 * self.codes  # the mean assignment, and its gradient

    @property
    def summing_calls(self) -> int:
        return CALLS_OF_ENTROPY

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


@register
@dataclass(frozen=True)
class LFQOptions(LevelOptions):
    """The sign of each channel, as one bit of the id; the codes are +-1 (2310.05737).

    An entropy term spreads the codes. Without a table, nothing is searched.
    """

    quantizer = LFQ
    kind: Literal["lfq"] = "lfq"
    commitment_weight: Weight = 0.25
    """Weight of |z - sg e|^2."""
    entropy_weight: Weight = 0.1
    """Weight of each token's entropy less that of the mean assignment."""
    diversity_weight: Weight = 1.0
    """Weight of the entropy of the mean assignment, relative to that of a token's."""
    temperature: Annotated[float, Range(1e-6, FACTOR)] = 0.01
    """Softness of the assignment whose entropies these are."""

    @classmethod
    def example(cls: type[Own]) -> Own:
        return cls(width=9, codes=512)

    def arguments(self) -> dict[str, Any]:
        return {name: value for name, value in super().arguments().items() if name != "codes"}

    def problems(self, at: str, config: Any) -> Iterator[str]:
        yield from super().problems(at, config)
        yield from bit_problems(at, self)
