"""State that changes once an optimizer step, from what all ranks and micro-batches have shown.

A selection bias needs the choices of the global batch, a moving average of codes its latents. Each
such module collects what this rank sees in training; `after_step` adds it up over ranks, applies it
and starts anew. So ranks stay equal, and nothing depends on how a batch is split.

Codebooks that average or restart also work by themselves: every forward pass in training is then a
step. `follow_steps` lets them wait for `after_step` instead, which gradient accumulation needs:

    follow_steps(model)
    for step in ...:
        for micro_batch in ...:
            (model(micro_batch).loss / micro_batches).backward()
        optimizer.step()
        after_step(model)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from simvq_moe.core.state import Stateful
from simvq_moe.core.usage import recomputing


class FollowsSteps(Stateful, ABC):
    """A module whose state changes once a step."""

    waits = False
    """Whether forward passes only collect, until `after_step`."""

    @property
    def collects(self) -> bool:
        """Whether this forward pass counts: in training, and not when it is run again."""
        return self.training and not recomputing()

    @abstractmethod
    def end_step(self) -> None:
        """Apply what has been collected and start anew; all ranks call it together."""

    @abstractmethod
    def drop_step(self) -> None:
        """Forget what has been collected."""


class StepState(FollowsSteps):
    """A module with sums that wait for the end of the step.

    They are no part of the state dict: after a step, where checkpoints are written, they are 0.

    Args:
        size: number of sums.
    """

    waits = True
    pending: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.hold("pending", partial(torch.zeros, size, dtype=torch.float64))

    @property
    def due(self) -> bool:
        """Whether the sums of the current step are wanted, the same on all ranks."""
        return True

    @property
    def collects(self) -> bool:
        return super().collects and self.due

    @abstractmethod
    def apply_sums(self, sums: Float[Tensor, " size"]) -> None:
        """Change the state by the sums of all ranks."""

    def end_step(self) -> None:
        """The sums are applied, if they were wanted."""

    def drop_step(self) -> None:
        self.pending.zero_()


def followers(model: nn.Module) -> list[FollowsSteps]:
    """The modules of a model whose state changes once a step."""
    return [module for module in model.modules() if isinstance(module, FollowsSteps)]


def follow_steps(model: nn.Module) -> None:
    """Let state change in `after_step` alone from now on, in no forward pass."""
    for module in followers(model):
        module.waits = True


@contextmanager
def one_step(model: nn.Module) -> Iterator[None]:
    """Forward passes inside are one step of the modules for which each of them is one by itself."""
    alone = [module for module in followers(model) if not module.waits]
    for module in alone:
        module.waits = True
    try:
        yield
    except BaseException:
        for module in alone:
            module.drop_step()
        raise
    finally:
        for module in alone:
            module.waits = False
    for module in alone:
        module.end_step()


@torch.no_grad()
def after_step(model: nn.Module) -> None:
    """Apply what all ranks have collected since the last call; every rank must call it.

    Without a module that waits for it nothing is exchanged.
    """
    waiting = [module for module in followers(model) if module.waits]
    due = [module for module in waiting if isinstance(module, StepState) and module.due]
    if due:
        sums = torch.cat([state.pending for state in due])
        if dist.is_initialized():
            dist.all_reduce(sums)
        parts = sums.split([len(state.pending) for state in due])
        for state, part in zip(due, parts, strict=True):
            state.apply_sums(part)
            state.drop_step()
    for module in waiting:
        module.end_step()


@torch.no_grad()
def drop_step(model: nn.Module) -> None:
    """Forget what this rank has collected, of a step that was not taken."""
    for module in followers(model):
        module.drop_step()
