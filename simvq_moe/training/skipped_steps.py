"""A step whose loss or gradient is not finite: it ends the run, or changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from simvq_moe.config.schema import TrainConfig
from simvq_moe.core.step_state import drop_step
from simvq_moe.engine.agreement import TrainingFailed, Undo
from simvq_moe.engine.world import World
from simvq_moe.training.step import StepOutcome

logger = logging.getLogger(__name__)

SKIPPED_IN_A_ROW = 10
"""Steps, after which a run that skips them ends."""


class SkippedSteps:
    """The rule for steps that the engine did not take. How many there were in a row is not kept in
    a checkpoint: a run that goes on may skip as many again.

    Args:
        engine: leaves out a step whose gradient is not finite, and counts it.
        model: the engine's, whose buffers are put back.
        train: says which rule is meant.
        world: this rank among all.
        saved: says which checkpoint is the newest.
    """

    def __init__(
        self,
        engine: Any,
        model: nn.Module,
        train: TrainConfig,
        world: World,
        saved: Callable[[], str],
    ) -> None:
        self.engine, self.model, self.world, self.saved = engine, model, world, saved
        self.stops = train.on_not_finite == "stop"
        # fp16 leaves out steps as well, until the scale of the loss is right
        may_skip = not self.stops or train.dtype == "fp16"
        self.undo = Undo(model) if may_skip else None
        self.in_a_row = 0

    def before_step(self) -> None:
        """Remember the state that a skipped step leaves behind."""
        if self.undo is not None:
            self.undo.mark()

    def taken(self) -> None:
        """The engine took the step."""
        self.in_a_row = 0

    def leave_out(self, step: int, outcome: StepOutcome) -> None:
        """Put back what the step has changed beside the weights.

        Raises:
            TrainingFailed: the run is to end at such a step, or has skipped too many.
        """
        finite = outcome.finite_loss
        what = f"gradient norm {outcome.norm}" if finite else "loss not finite"
        if self.undo is None or (not finite and self.stops):
            raise TrainingFailed(f"step {step}: {what}; {self._last_good(step)}")
        self.undo.undo()
        drop_step(self.model)
        if finite and self.engine.fp16_enabled():
            return
        if self.in_a_row + 1 == SKIPPED_IN_A_ROW:
            raise TrainingFailed(
                f"steps up to {step}: {what}, {SKIPPED_IN_A_ROW} skipped in a row; "
                f"{self._last_good(step)}"
            )
        self.in_a_row += 1
        if self.world.is_main:
            skipped = self.engine.skipped_steps
            logger.warning("step %d is skipped: %s (%d so far)", step, what, skipped)

    def metrics(self) -> dict[str, float]:
        """Steps that were skipped so far, where any may be."""
        if self.undo is None:
            return {}
        return {"train/skipped_steps": float(self.engine.skipped_steps)}

    def _last_good(self, step: int) -> str:
        return (
            f"step {step - 1 - self.in_a_row} was the last good one ({self.saved()}); lower "
            "optimizer.lr or set train.clip, with another --name"
        )
