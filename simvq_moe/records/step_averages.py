"""What steps return and take, since the last logged step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from simvq_moe.engine.step_phases import PHASES, Phases
from simvq_moe.engine.world import World


class StepAverages:
    """Sums since the last logged step; part of a checkpoint, so that a resumed window is whole."""

    def __init__(
        self,
        steps: int = 0,
        seconds: float = 0.0,
        sums: dict[str, Tensor] | None = None,
        phases: dict[str, float] | None = None,
    ) -> None:
        self.steps, self.seconds = steps, seconds
        self.sums = sums or {}
        self.phases = phases or dict.fromkeys(PHASES, 0.0)

    def add(self, terms: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Add scalars by name; they stay on the device."""
        for name, value in terms.items():
            value = value.detach().double() * weight
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take(self, phases: Phases) -> None:
        """Add what phases have measured since they were last asked."""
        for name, seconds in phases.take().items():
            self.phases[name] += seconds

    def means(self, world: World) -> dict[str, float]:
        """Means over steps and ranks: train/NAME, and seconds as time/PHASE; every rank must call
        it."""
        names = sorted(self.sums)
        sums = torch.stack([self.sums[name] for name in names])
        seconds = sums.new_tensor([self.seconds, *self.phases.values()])
        means = world.sum(torch.cat([sums, seconds]) / self.steps) / world.size
        keys = [f"train/{name}" for name in names]
        keys += [f"time/{name}" for name in ("step", *self.phases)]
        return dict(zip(keys, means.tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "sums": self.sums,
            "phases": self.phases,
        }


def of_other_ranks(ranks: Sequence[Mapping[str, Any]], world: World) -> Mapping[str, Any]:
    """What a rank goes on with where another number of ranks has kept these: means of the window
    and sums of the counts over ranks stay as they were."""
    windows, by_counter = [rank["window"] for rank in ranks], [rank["counts"] for rank in ranks]
    sums = {
        name: torch.stack([window["sums"][name] for window in windows]).mean()
        for name in windows[0]["sums"]
    }
    counts = [
        torch.stack(counts).sum(0) * int(world.is_main) for counts in zip(*by_counter, strict=True)
    ]
    return {"window": windows[0] | {"sums": sums}, "counts": counts}
