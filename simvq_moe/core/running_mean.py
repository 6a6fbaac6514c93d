"""A running mean that changes once an optimizer step."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from simvq_moe.core.step_state import StepState
from simvq_moe.core.usage import once


class RunningMean(StepState):
    """The running mean of vectors over tokens, the same in training and evaluation.

    A mean over the batch would let a token see later ones, and there is none in generation. Here
    m <- m + (mean of the step - m) (1 - decay) / (1 - decay^t) after step t: the average of all
    steps' means with weights decay^age, which owes nothing to the start at 0 (the correction of
    Adam, arXiv:1412.6980). At step 0 m is 0.

    Args:
        width: channels of a vector.
        decay: weight of the past.
    """

    mean: Tensor
    steps: Tensor

    def __init__(self, width: int, decay: float = 0.99) -> None:
        super().__init__(width + 1)
        self.decay = decay
        self.register_average("mean", torch.zeros(width), torch.float64)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def collect(self, x: Float[Tensor, "tokens width"]) -> None:
        """Count these in at the end of the step, if in training."""
        if self.collects:
            tokens = torch.full_like(self.pending[:1], len(x))
            self.pending += once(torch.cat([x.sum(0, dtype=self.pending.dtype), tokens]))

    def apply_sums(self, sums: Float[Tensor, " size"]) -> None:
        tokens = sums[-1]
        counts = (tokens > 0) & sums.isfinite().all()  # a step of NaN would stay for ever
        step = self.steps + 1
        weight = (1 - self.decay) / (1 - self.decay ** step.double())
        change = weight * (sums[:-1] / tokens.clamp_min(1) - self.mean)
        self.mean += torch.where(counts, change, 0)
        self.steps += counts.to(torch.int64)

    def extra_repr(self) -> str:
        return f"width={len(self.mean)}, decay={self.decay}"
