"""The banks of a model, followed while it trains: `bank/00`, `bank/01`, ... in module order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from simvq_moe.core.bank import Bank
from simvq_moe.core.dynamics import BankDynamics, bank_steps, singular_values
from simvq_moe.core.usage import UsageCounter
from simvq_moe.engine.sharding import gathered
from simvq_moe.engine.world import World
from simvq_moe.moe import MoE
from simvq_moe.quantizers import GroupVQ


@dataclass(frozen=True)
class Followed:
    """A bank, and the number of the counter that counts its slots."""

    name: str
    dynamics: BankDynamics
    layer: int


class Banks:
    """Every bank whose slots are counted, with or without a map, so that arms share their numbers.

    Args:
        model: as it starts, for distances are measured from there.
        counters: those of the model, in their order.
    """

    def __init__(self, model: nn.Module, counters: Sequence[UsageCounter]) -> None:
        self.followed = list(_follow(model, counters))
        self.names = [one.name for one in self.followed]
        self.spectra: dict[str, np.ndarray] = {}
        """Singular values of every shared map when they were last measured, from the largest on, by
        number of the bank, as in the names of measures."""

    def mark(self) -> None:
        """Call on every rank before the last step of a window, the one that is measured."""
        for one in self.followed:
            with gathered(one.dynamics.bank):
                one.dynamics.mark()

    def measure(
        self, counts: Sequence[np.ndarray], steps: int, world: World, *, spectra: bool
    ) -> dict[str, float]:
        """Measures after that step, by name; every rank must call it.

        Args:
            counts: draws of every layer in the window, over all ranks.
            steps: optimizer steps of the window.
            spectra: decompose the maps, too, for which ranks take turns: a wide one takes seconds.
        """
        if not self.followed:
            return {}
        drawn = [torch.from_numpy(n).to(world.device) for n in counts]
        observed = []
        for one in self.followed:
            with gathered(one.dynamics.bank):
                observed.append(
                    one.dynamics.observe(drawn[one.layer], steps=steps, spectrum=spectra)
                )
        values = singular_values(
            observed, world.sum, mine=lambda bank: bank % world.size == world.rank
        )
        if spectra:
            pairs = enumerate(values)
            self.spectra = {f"{i:02d}": v.cpu().numpy() for i, v in pairs if v is not None}
        return {
            f"bank/{i:02d}/{name}": value
            for i, step in enumerate(bank_steps(observed, world.sum, values))
            for name, value in step.as_dict().items()
        }

    def state(self) -> list[Tensor | None]:
        """Steps since each slot was drawn, the same on every rank; part of a checkpoint."""
        return [one.dynamics.stale_for for one in self.followed]

    def take_up(self, state: Sequence[Tensor | None]) -> None:
        for one, stale in zip(self.followed, state, strict=True):
            one.dynamics.stale_for = stale


def _follow(model: nn.Module, counters: Sequence[UsageCounter]) -> Iterator[Followed]:
    for path, owner in model.named_modules():
        counter = getattr(owner, "counter", None)
        if not isinstance(counter, UsageCounter):
            continue
        layer = next(i for i, one in enumerate(counters) if one is counter)
        for name, bank in owner.named_modules(prefix=path):
            if isinstance(bank, Bank):
                # codes in groups are slots each
                axes = 2 if isinstance(owner, GroupVQ) else 1
                first = _first_expert(owner, bank)
                with gathered(bank):
                    dynamics = BankDynamics(bank, slot_axes=axes, first=first)
                yield Followed(name, dynamics, layer)


def _first_expert(owner: nn.Module, bank: Bank) -> int:
    """The number of the first expert that this rank holds, which may be one of several."""
    if isinstance(owner, MoE) and bank in owner.experts.banks:
        return owner.experts.mine.start
    return 0
