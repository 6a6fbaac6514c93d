"""Codes that the data win pull the others along while the encoder moves (NS-VQ, arXiv:2602.18896).

"NS" is non-stationary: as the encoder drifts, a code that nothing selects is left behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.ranges import FACTOR, Count, Range, Weight
from simvq_moe.config.registry import register
from simvq_moe.quantizers.kinds.vq import VQ, VQOptions

LEAST_TEMPERATURE = 1e-8
LARGEST_MATRIX = 2**20
"""Elements of a tokens x codes matrix that is made at once."""


class NSVQ(VQ):
    """A VQ whose codebook loss also pulls codes that were not selected, by a soft assignment.

    The term "neighbour" is sum_n sum_{i not selected} w_ni |e_i - sg z_n|^2 / (tokens width) with

        w_ni = min(1, neighbour_weight codes softmax_i(-|z_n - e_i|^2 / temperature))

    held constant, as in the authors' code; it counts by `codebook_weight`. The temperature halves
    every `halving` steps: at first nearly all codes follow the data, at last the selected alone.
    Its cost grows with tokens x codes; no such matrix is kept for the backward pass.

    Args:
        codes: number of codes.
        width: channels of a code.
        neighbour_weight: share of a selected code's pull that codes get which are all equally near.
        temperature: at the start, in squared distances: of that size between codes and latents.
        halving: steps after which the temperature is half of what it was.
        options: those of `VQ`.
    """

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        neighbour_weight: float = 0.01,
        temperature: float = 1.0,
        halving: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(codes, width, **options)
        self.neighbour_weight = neighbour_weight
        self.temperature = temperature
        self.halving = halving
        self.weights["neighbour"] = self.weights["codebook"]
        if self.moved is None:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def losses(
        self, z: Float[Tensor, "tokens width"], e: Float[Tensor, "tokens width"]
    ) -> dict[str, Tensor]:
        return super().losses(z, e) | {"neighbour": self._neighbours(z.detach())}

    def _neighbours(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, ""]:
        E = self.codebook(z.dtype)
        temperature = self.temperature * 2 ** (-self.step.to(z.dtype) / self.halving)
        with torch.no_grad():
            of_codes, pulls, of_latents = E.new_zeros(len(E)), torch.zeros_like(E), z.new_zeros(())
            for part in z.split(max(1, LARGEST_MATRIX // len(E))):
                w = self._weights(part, E, temperature.clamp_min(LEAST_TEMPERATURE))
                of_codes += w.sum(0)
                pulls += w.T @ part
                of_latents += w.sum(1) @ part.square().sum(1)
        # |e - z|^2 multiplied out, so that the gradient takes sums over tokens alone
        apart = of_latents + of_codes @ E.square().sum(1) - 2 * (E * pulls).sum()
        return apart / max(z.numel(), 1)

    def _weights(
        self, z: Float[Tensor, "tokens width"], E: Float[Tensor, "codes width"], temperature: Tensor
    ) -> Float[Tensor, "tokens codes"]:
        """w of each latent and code, 0 for the nearest code."""
        square = torch.cdist(z, E).square_()
        nearest = square.argmin(1, keepdim=True)
        soft = square.div_(-temperature).softmax(1)
        return soft.mul_(self.neighbour_weight * self.codes).clamp_max_(1).scatter_(1, nearest, 0)

    @property
    def changes_by_steps(self) -> bool:
        return True

    @torch.no_grad()
    def update(
        self,
        z: Float[Tensor, "tokens width"],
        ids: Int[Tensor, " tokens"],
        parts: Sequence[int],
    ) -> None:
        """Count the step, and restart codes that are no longer drawn."""
        if self.moved is None:
            self.step += 1
        else:
            super().update(z, ids, parts)


@register
@dataclass(frozen=True)
class NSVQOptions(VQOptions):
    """Free rows that follow the encoder's drift: those that are not chosen are pulled by a soft
    assignment, at first all and at last none (NS-VQ, 2602.18896)."""

    quantizer = NSVQ
    kind: Literal["ns_vq"] = "ns_vq"  # pyright: ignore[reportIncompatibleVariableOverride]
    neighbour_weight: Weight = 0.01
    """Pull on a code that was not chosen, of a chosen one's, where all codes are equally near."""
    temperature: Annotated[float, Range(1e-6, FACTOR)] = 1.0
    """Softness of that assignment at the start, in squared distances."""
    halving: Count = 100
    """Steps after which the temperature is half of what it was."""
