"""How far a tokenizer's latents go in a step, because codes that nothing draws stay behind."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from simvq_moe.engine.sharding import ready
from simvq_moe.models.tokenizer import Tokenizer
from simvq_moe.tasks.registry import AnyTask
from simvq_moe.tasks.samples import evenly_spread

SAMPLES = 16
"""Held-out samples that are followed."""


class LatentDrift:
    """The shift of the mean latent by one optimizer step, over the latents' spread before it.

    The samples are always the same, so that what moves is the encoder: means of different batches
    differ by far more than the encoder moves in a step.

    Args:
        task: with the live model; models that are no tokenizers have no drift.
        device: where the model is.
    """

    def __init__(self, task: AnyTask, device: torch.device) -> None:
        self.model = task.model if isinstance(task.model, Tokenizer) else None
        self.before: Tensor | None = None
        if self.model is not None:
            followed = evenly_spread(len(task.held_out), SAMPLES)
            self.samples = task.held_out.batch(followed).to(device)

    def mark(self) -> None:
        """Call on every rank before the step that is measured."""
        if self.model is not None:
            self.before = self._latents(self.model)

    def measure(self) -> dict[str, float]:
        """The measure after that step, by name; every rank must call it."""
        if self.model is None or self.before is None:
            return {}
        found = drift(self.before, self._latents(self.model))
        self.before = None
        return {"train/latent_drift": float(found)}

    @torch.no_grad()
    def _latents(self, model: Tokenizer) -> Float64[Tensor, "tokens width"]:
        with ready(model):
            z = model.latents(self.samples)
        return z.flatten(0, -2).double()


def drift(
    before: Float[Tensor, "tokens width"], after: Float[Tensor, "tokens width"]
) -> Float[Tensor, ""]:
    """|mean after - mean before| over the root mean square distance of `before` from its mean."""
    mean = before.mean(0)
    spread = (before - mean).square().sum(1).mean().sqrt()
    return (after.mean(0) - mean).norm() / spread
