"""How a bank moves: the analysis behind SimVQ (arXiv:2411.02038, section 4) as a measurement.

One step on the shared map moves every row, those that the batch selected and those that it did not:
e_i <- e_i - eta (G_i W^T W + q_i sum_j q_j^T G_j). `BankDynamics` measures both movements on a live
model, how long rows were left alone, and how far W has gone from its start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from simvq_moe.core.bank import Bank, effective_rank, stable_rank

LARGEST_COPY = 2**19
"""Elements of a bank whose movement is followed; of more, some are, evenly spread."""


@dataclass(frozen=True)
class BankStep:
    """One step of a bank; movements are mean Euclidean distances that slots' rows went in it."""

    selected_movement: float
    """Slots that were drawn; 0 if there are none."""
    unselected_movement: float | None
    """Slots that were not drawn, None without any; momentum and weight decay move them too."""
    indirect_movement: float | None
    """How far the change of the shared map (and bias) alone moves slots that were not drawn, over
    selected_movement: 0 without a shared map, near 1 under a strong coupling."""
    staleness: float
    """Mean number of steps since a slot was last drawn."""
    max_staleness: float
    """The largest number of steps since a slot was last drawn."""
    start_distance: float | None
    """|W - W at the start| / |W at the start|, Frobenius; separate maps: all as one."""
    identity_distance: float | None
    """|W - I| / sqrt(width), Frobenius; None where W is not square."""
    condition: float | None
    """Largest over smallest singular value of a shared map."""
    stable_rank: float | None
    """Squared Frobenius norm of a shared map over its squared spectral norm."""
    effective_rank: float | None
    """exp of the entropy of a shared map's normalized singular values."""

    def as_dict(self) -> dict[str, float]:
        """Measures by name, without those that the bank does not have."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class BankDynamics:
    """Follows one bank; its slots are codes or experts.

    A measurement lies between `mark` and `step`; both around one optimizer step measure that step,
    and steps in between measurements may be left out. A slot counts as drawn if it was drawn in any
    step since the last measurement.

    Args:
        bank: a live bank, as it is at the start.
        slot_axes: leading axes of the bank's rows that number slots; what follows them, but for
            the channels, belongs to one slot.
        first: number of the first slot of a bank that holds a part of all.
    """

    def __init__(self, bank: Bank, *, slot_axes: int = 1, first: int = 0) -> None:
        self.bank, self.slot_axes = bank, slot_axes
        *lead, width = bank.base.shape
        slots = prod(lead[:slot_axes])
        self.slots = slice(first, first + slots)
        self.watched = _spread(slots, LARGEST_COPY // width)
        self.inside = _spread(prod(lead[slot_axes:]), LARGEST_COPY // (width * len(self.watched)))
        self.start = bank.matrix().detach().clone() if bank.maps else None
        self.stale_for: Tensor | None = None
        self.mark()

    @torch.no_grad()
    def mark(self) -> None:
        """Remember rows and map as they are before a step."""
        self.before, self.map_before = self._rows(), self._shared_map()

    @torch.no_grad()
    def step(
        self,
        counts: Int[Tensor, " slots"],
        *,
        steps: int = 1,
        total: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> BankStep:
        """Measure after an optimizer step, and mark for the next.

        Args:
            counts: draws of every slot since the last measurement, summed over ranks.
            steps: optimizer steps since then.
            total: adds a tensor over ranks; every rank must call this together.
        """
        counts = counts.to(self.bank.base.device)
        stale = torch.zeros_like(counts) if self.stale_for is None else self.stale_for
        self.stale_for = torch.where(counts > 0, 0, stale.to(counts) + steps)
        sums = total(self._moved(counts[self.slots] > 0)).tolist()
        self.mark()
        selected, many, unselected, by_map, few = sums
        direct = selected / max(many, 1)
        return BankStep(
            selected_movement=direct,
            unselected_movement=unselected / few if few else None,
            indirect_movement=by_map / few / direct if few and direct else None,
            staleness=float(self.stale_for.double().mean()),
            max_staleness=float(self.stale_for.max()),
            **self._map(),
        )

    def _moved(self, drawn: Bool[Tensor, " slots"]) -> Float[Tensor, " sums"]:
        """Summed distances of drawn slots and of others, of the latter also by the shared map
        alone, and how many they are."""
        drawn = drawn[self.watched.to(drawn.device)]
        distance = (self._rows() - self.before).flatten(1).norm(dim=1)
        # e' - e = (q' - q) W + (q' (W' - W) + b' - b): the second part is shared
        (W, b), (W_before, b_before) = self._shared_map(), self.map_before
        by_map = (self._base() @ (W - W_before) + b - b_before).flatten(1).norm(dim=1)
        sums = [distance[drawn], drawn, distance[~drawn], by_map[~drawn], ~drawn]
        return torch.stack([x.double().sum() for x in sums])

    def _base(self) -> Float[Tensor, "slots inner base_width"]:
        base = self.bank.base.detach().flatten(0, self.slot_axes - 1)[self.watched]
        return base.reshape(len(base), -1, base.shape[-1])[:, self.inside].double()

    def _rows(self) -> Float[Tensor, "slots inner width"]:
        maps, bias = self.bank.matrix(), self.bank.bias
        if not self.bank.shared:
            slots = self.slots.stop - self.slots.start
            maps = maps[self.watched.to(maps.device) // (slots // len(maps))]
        rows = self._base() @ maps
        return rows if bias is None else rows + bias.double()

    def _shared_map(self) -> tuple[Tensor, Tensor]:
        """What moves all rows at once: W, or 0 where maps are separate, and the bias."""
        W, bias = self.bank.matrix(), self.bank.bias
        shared = W.clone() if self.bank.shared else torch.zeros_like(W[0])
        return shared, torch.zeros_like(shared[0]) if bias is None else bias.double().clone()

    def _map(self) -> dict[str, float | None]:
        bank = self.bank
        names = ("start_distance", "identity_distance", "condition", "stable_rank")
        measured: dict[str, float | None] = dict.fromkeys((*names, "effective_rank"))
        if self.start is None:
            return measured
        moved = (bank.matrix() - self.start).norm() / self.start.norm()
        measured["start_distance"] = float(moved)
        if bank.base.shape[-1] == bank.width:
            measured["identity_distance"] = bank.identity_distance()
        if bank.shared:
            spectrum = bank.spectrum()
            measured["condition"] = float(spectrum[0] / spectrum[-1])
            measured["stable_rank"] = stable_rank(spectrum)
            measured["effective_rank"] = effective_rank(spectrum)
        return measured


def _spread(number: int, room: int) -> Tensor:
    """As many of `number` indices as there is room for, evenly spread."""
    few = max(1, min(number, room))
    return torch.linspace(0, number - 1, few, dtype=torch.float64).round().long()
