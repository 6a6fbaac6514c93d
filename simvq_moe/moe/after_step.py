"""State that changes once an optimizer step, from sums over all ranks and micro-batches.

A selection bias needs the choices of the global batch, a running mean its sum. Each such module
adds up what this rank sees in training; `after_step` adds all of it over ranks in one all-reduce,
applies it and starts anew. So ranks stay equal, and nothing depends on how a batch is split.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from simvq_moe.core.usage import recomputing


class StepState(nn.Module):
    """A module with sums that wait for the end of the step.

    They are no part of the state dict: after a step, where checkpoints are written, they are 0.

    Args:
        size: number of sums.
    """

    pending: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("pending", torch.zeros(size, dtype=torch.float64), persistent=False)

    @property
    def collects(self) -> bool:
        """Whether this forward pass counts: in training, and not when it is run again."""
        return self.training and not recomputing()

    def apply_sums(self, sums: Float[Tensor, " size"]) -> None:
        """Change the state by the sums of all ranks."""
        raise NotImplementedError


@torch.no_grad()
def after_step(model: nn.Module) -> None:
    """Apply what all ranks have added up since the last call; every rank must call it.

    Without a module that waits for it nothing is exchanged.
    """
    states = [module for module in model.modules() if isinstance(module, StepState)]
    if not states:
        return
    sums = torch.cat([state.pending for state in states])
    if dist.is_initialized():
        dist.all_reduce(sums)
    parts = sums.split([len(state.pending) for state in states])
    for state, part in zip(states, parts, strict=True):
        state.apply_sums(part)
        state.pending.zero_()


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
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def collect(self, x: Float[Tensor, "tokens width"]) -> None:
        """Count these in at the end of the step, if in training."""
        if self.collects:
            tokens = torch.full_like(self.pending[:1], len(x))
            self.pending += torch.cat([x.sum(0, dtype=self.pending.dtype), tokens])

    def apply_sums(self, sums: Float[Tensor, " size"]) -> None:
        tokens = sums[-1]
        step = self.steps + 1
        weight = (1 - self.decay) / (1 - self.decay ** step.double())
        change = weight * (sums[:-1] / tokens.clamp_min(1) - self.mean)
        self.mean += torch.where(tokens > 0, change, 0)
        self.steps += (tokens > 0).to(torch.int64)

    def extra_repr(self) -> str:
        return f"width={len(self.mean)}, decay={self.decay}"
