"""Frozen rows under a map that the data set, not a gradient: SimVQ's control without learning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.quantizer import QuantizerOptions
from simvq_moe.config.ranges import Share
from simvq_moe.config.registry import register
from simvq_moe.core.bank import Bank
from simvq_moe.core.collectives import total
from simvq_moe.quantizers.codebook import random_codebook
from simvq_moe.quantizers.kinds.vq import VQ, VQOptions, plain_vq
from simvq_moe.quantizers.options import LearnedOptions, shared_fields
from simvq_moe.quantizers.parts.averaged import AveragedCodebook


class RunningMapVQ(AveragedCodebook):
    """Codes q sqrt(width) C^(1/2) + m: frozen rows q ~ N(0, 1/width) with the latents' moments.

    m and C are the running mean and covariance of the latents. They start from the first batch as
    SimVQ's map does from data, and follow the encoder after every step, with weights decay^age:

        m <- m + w s        C <- (1 - w) C + w S - w^2 s s^T        w = 1 / sum of such weights

    s and S are the mean and second moment of the step's latents, of all ranks, about the m before
    it. Sums and moments are in float64. Nothing is learned, so there is no codebook loss.

    Args:
        codes: number of codes.
        width: channels of a code.
        decay: weight of the past in the moments, a step.
        options: those of `Quantizer`, without a codebook loss.
    """

    base: Tensor
    mean: Tensor
    covariance: Tensor
    weight: Tensor

    def __init__(self, codes: int, width: int, *, decay: float = 0.99, **options: Any) -> None:
        super().__init__(codes, width, **options)
        self.decay = decay
        start = random_codebook(codes, width)
        self.register_buffer("base", start)
        self.register_average("codes_now", start.clone(), torch.float32)
        self.register_average("mean", torch.zeros(width), torch.float64)
        self.register_average("covariance", torch.zeros(width, width), torch.float64)
        # an axis of one, because torch.compile takes a single number of the CPU for a constant
        self.register_average("weight", torch.zeros(1), torch.float64)
        self._wait_for_data()

    @property
    def summed_numbers(self) -> int:
        return 1 + self.width + self.width**2  # tokens, and their first and second moments

    @property
    def summed_bytes(self) -> int:
        return 8 * self.summed_numbers

    @property
    def summing_calls(self) -> int:
        return 1

    def fit(self, z: Float[Tensor, "tokens width"]) -> None:
        self.weight.zero_()
        self._follow(z)
        self._started()

    @torch.no_grad()
    def update(
        self,
        z: Float[Tensor, "tokens width"],
        ids: Int[Tensor, " tokens"],
        parts: Sequence[int],
    ) -> None:
        """Take up the latents of all ranks, and set the codes by the new moments."""
        del ids, parts
        self._follow(z)

    def _follow(self, z: Float[Tensor, "tokens width"]) -> None:
        centred = z.double() - self.mean
        tokens = self.mean.new_full((1,), len(z))
        sums = torch.cat([tokens, centred.sum(0), (centred.T @ centred).flatten()])
        tokens, first, seconds = total(sums).split([1, self.width, self.width**2])
        seen = tokens > 0  # a step of padding alone says nothing, and is not waited for
        self.weight.copy_(torch.where(seen, self.decay * self.weight + 1, self.weight))
        w = torch.where(seen, 1 / self.weight, 0.0)
        shift = first / tokens.clamp_min(1)
        step = seconds.view_as(self.covariance) / tokens.clamp_min(1) - w * shift.outer(shift)
        self.covariance.lerp_(step, w)
        self.mean.add_(w * shift)
        variances, axes = torch.linalg.eigh(self.covariance)
        root = axes * (self.width * variances.clamp_min(0)).sqrt() @ axes.T
        self.codes_now.copy_(self.base.double() @ root + self.mean)

    def fold(self) -> VQ:
        """A plain VQ with the codes as they are now."""
        return plain_vq(self, Bank(self.codes_now, transform="none"))


@register
@dataclass(frozen=True)
class RunningMapOptions(LearnedOptions):
    """Frozen rows under the root of the latents' running covariance, and their mean: the map of
    SimVQ from data, kept up with the encoder, without anything learned."""

    quantizer = RunningMapVQ
    kind: Literal["running_map"] = "running_map"
    decay: Share = 0.99
    """Weight of the past in the running moments, a step; less than 1."""

    def folded(self) -> QuantizerOptions:
        return VQOptions(**shared_fields(self, LearnedOptions))

    def problems(self, at: str, config: Any) -> Iterator[str]:
        yield from super().problems(at, config)
        if not self.decay < 1:
            yield f"{at}.decay {self.decay} is not below 1: use less, or the moments never move"
