"""One optimizer step: forward, backward and update over this rank's share of a batch, and what all
ranks agree on while it goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from simvq_moe.config.schema import TrainConfig
from simvq_moe.core.search.nearest import NotFiniteError
from simvq_moe.core.step_state import after_step, followers
from simvq_moe.engine.agreement import Agreement
from simvq_moe.engine.step_phases import Phase
from simvq_moe.engine.world import World
from simvq_moe.records.step_averages import StepAverages


class StepOutcome(NamedTuple):
    """What all ranks know of a step."""

    stop: bool
    """Whether one was asked to stop after it."""
    failed: bool
    """Whether one can't go on."""
    finite_loss: bool
    """Whether the losses of all are finite."""
    norm: float
    """Norm of the gradient over all ranks, before it was clipped."""
    terms: dict[str, Tensor]
    """The loss and its terms on this rank, and the norm."""

    @property
    def taken(self) -> bool:
        """Whether the engine has moved the weights."""
        return self.finite_loss and math.isfinite(self.norm)


class OptimizerStep:
    """Steps of one engine.

    Args:
        engine: of DeepSpeed.
        model: the engine's.
        train: says in how many micro-batches a step goes, and what becomes of NaN.
        world: this rank among all.
        phase: measures the phase of a step that runs inside.
    """

    def __init__(
        self,
        engine: Any,
        model: nn.Module,
        train: TrainConfig,
        world: World,
        phase: Callable[[Phase], AbstractContextManager[None]],
    ) -> None:
        self.engine, self.model = engine, model
        self.train, self.world, self.phase = train, world, phase
        self.has_step_state = bool(followers(model))

    def take(
        self, micro_batches: Sequence[Tensor], stop_asked: Callable[[], bool], *, failed: bool
    ) -> StepOutcome:
        """Take one step; all ranks call it together.

        Args:
            stop_asked: whether this process was asked to stop; called once, after the last forward
                pass.
            failed: whether this rank can't go on.
        """
        if not self.model.training:  # after an evaluation; to set it costs 1 % of a small step
            self.engine.train()
        parts = self.train.accumulation
        agreement, sums = Agreement(self.world), StepAverages()
        for i, micro_batch in enumerate(micro_batches):
            with self.phase("data"):
                batch = micro_batch.to(self.world.device, non_blocking=True)
            with self.phase("forward"):
                loss, terms = self._forward(batch)
            sums.add({"loss": loss, **terms}, 1 / parts)
            if i == parts - 1:
                agreement.ask(stop_asked(), sums.sums["loss"], failed)
            with self.phase("backward"):
                self.engine.backward(loss)
            with self.phase("optimizer"):
                self.engine.step()
        with self.phase("communication"):
            stop, finite, failed = agreement.answer()
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        outcome = StepOutcome(stop, failed, finite, norm, sums.sums)
        if outcome.taken and not failed:
            if self.has_step_state:
                with self.phase("optimizer"):
                    after_step(self.model)
            sums.add({"grad_norm": torch.full((), norm, device=self.world.device)})
        return outcome

    def _forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            loss, terms = self.engine(batch)
        except NotFiniteError:
            return self._not_a_number(batch), {}
        if self.train.on_not_finite == "skip":
            # the engine leaves out what has no finite gradient
            loss = loss * torch.where(loss.isfinite(), 1.0, math.nan)
        return loss, terms

    def _not_a_number(self, batch: Tensor) -> Tensor:
        """A loss of NaN, by which this rank makes the same collective calls as the others."""
        try:
            return math.nan * self.engine(torch.zeros_like(batch))[0]
        except NotFiniteError:
            # not the batch, then, but parameters, which are the others' as well
            parameters = [p.sum() for p in self.model.parameters() if p.requires_grad]
            return math.nan * torch.stack(parameters).sum()
