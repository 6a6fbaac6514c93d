"""A codebook of moving averages (VQ-VAE, arXiv:1711.00937, appendix A.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.ranges import Share
from simvq_moe.config.registry import register
from simvq_moe.core.choices import check_choice, check_none
from simvq_moe.quantizers.codebook import random_codebook
from simvq_moe.quantizers.kinds.vq import Init
from simvq_moe.quantizers.options import RestartingOptions
from simvq_moe.quantizers.parts.averaged import AveragedCodebook
from simvq_moe.quantizers.parts.kmeans import assigned, kmeans
from simvq_moe.quantizers.parts.restart import CALLS, restart_codes, restart_problems


class EMAVQ(AveragedCodebook):
    """A codebook of moving averages of the latents assigned to each code; it has no gradient.

    counts <- decay counts + (1 - decay) n, sums <- decay sums + (1 - decay) sum of z, code = sums /
    smoothed counts, with Laplace smoothing (counts + eps) / (total + codes eps) total. n and the
    sums are added over all ranks first. Counts start at one a code, so that a code that is never
    selected stays where it is until its count falls to `epsilon`.

    Args:
        codes: number of codes.
        width: channels of a code.
        decay: weight of the past in the averages.
        epsilon: Laplace smoothing, in draws.
        restart: a code whose count falls below this many draws a step restarts at a random latent
            of the batch, with a count of one; 0: never.
        init: "random": rows from N(0, 1/width); "kmeans": centres of the first batch.
        options: those of `Quantizer`, without a codebook loss.
    """

    sums: Tensor
    counts: Tensor
    step: Tensor

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        restart: float = 0.0,
        init: Init = "random",
        **options: Any,
    ) -> None:
        super().__init__(codes, width, **options)
        check_choice("init", init, Init)
        check_none(restart_problems(restart))
        self.decay = decay
        self.epsilon = epsilon
        self.restart = restart
        start = random_codebook(codes, width)
        self.register_average("codes_now", start, torch.float32)
        self.register_average("sums", start.clone(), torch.float32)
        self.register_average("counts", torch.ones(codes), torch.float32)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        if init == "kmeans":
            self._wait_for_data()

    def fit(self, z: Float[Tensor, "tokens width"]) -> None:
        self.codes_now.copy_(kmeans(z, self.codebook(z.dtype)))
        self.sums.copy_(self.codes_now)
        self._started()

    @property
    def summed_numbers(self) -> int:
        return self.codes * (self.width + 1)  # sums of latents, and their numbers

    @property
    def summing_calls(self) -> int:
        return 1 + (CALLS if self.restart else 0)

    @torch.no_grad()
    def update(
        self,
        z: Float[Tensor, "tokens width"],
        ids: Int[Tensor, " tokens"],
        parts: Sequence[int],
    ) -> None:
        """Move the averages by the batch of all ranks."""
        sums, drawn = assigned(z.to(self.sums.dtype), ids, self.codes)
        self.sums.lerp_(sums, 1 - self.decay)
        self.counts.lerp_(drawn, 1 - self.decay)
        if self.restart:
            # sums and counts, or the next average would undo the restart
            restart_codes(
                self.sums,
                self.counts,
                z,
                idle=drawn == 0,
                below=self.restart,
                step=self.step,
                parts=parts,
            )
        all_counts = self.counts.sum()
        smoothed = (self.counts + self.epsilon) / (all_counts + self.codes * self.epsilon)
        self.codes_now.copy_(self.sums / (smoothed * all_counts)[:, None])
        self.step += 1


@register
@dataclass(frozen=True)
class EMAVQOptions(RestartingOptions):
    """Moving averages of the latents of each code, without a gradient (1711.00937, A.1)."""

    quantizer = EMAVQ
    kind: Literal["ema"] = "ema"
    decay: Share = 0.99
    """Weight of the past in the averages; less than 1."""

    def problems(self, at: str, config: Any) -> Iterator[str]:
        yield from super().problems(at, config)
        if not self.decay < 1:
            yield f"{at}.decay {self.decay} is not below 1: use less, or the codes never move"
