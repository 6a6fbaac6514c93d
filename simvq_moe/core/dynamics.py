"""How a bank moves: the analysis behind SimVQ (arXiv:2411.02038, section 4) as a measurement.

One step on the shared map moves every row, those that the batch selected and those that it did not:
e_i <- e_i - eta (G_i W^T W + q_i sum_j q_j^T G_j). `BankDynamics` measures both movements on a live
model, how long rows were left alone, and how far W has gone from its start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import NamedTuple

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
    start_distance: float | None = None
    """|W - W at the start| / |W at the start|, Frobenius; separate maps: all as one."""
    identity_distance: float | None = None
    """|W - I| / sqrt(width), Frobenius; None where W is not square."""
    condition: float | None = None
    """Largest over smallest singular value of a shared map."""
    stable_rank: float | None = None
    """Squared Frobenius norm of a shared map over its squared spectral norm."""
    effective_rank: float | None = None
    """exp of the entropy of a shared map's normalized singular values."""

    def as_dict(self) -> dict[str, float]:
        """Measures by name, without those that the bank does not have."""
        return {name: value for name, value in vars(self).items() if value is not None}


class Observed(NamedTuple):
    """What a step did to a bank, as tensors that nothing has waited for."""

    sums: Float[Tensor, " sums"]
    """See `BankDynamics._moved`; of the slots of this rank."""
    described: dict[str, Tensor]
    """Fields of `BankStep` that every rank has, float64 scalars."""
    shared_map: Tensor | None
    """The map whose spectrum is measured: the matrix, or the factors of a diagonal one. None: the
    bank has none, or it is not to be measured."""


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
        """Remember base, map and bias as they are before a step."""
        base = self._base()
        # an index copies, but all of a base is the live one
        self.before = base.clone() if base.data_ptr() == self.bank.base.data_ptr() else base
        self.maps_before, self.bias_before = self._maps(), self._bias()

    @torch.no_grad()
    def observe(
        self, counts: Int[Tensor, " slots"], *, steps: int = 1, spectrum: bool = True
    ) -> Observed:
        """Measure after an optimizer step; `bank_steps` makes numbers of it.

        Args:
            counts: draws of every slot since the last measurement, summed over ranks.
            steps: optimizer steps since then.
            spectrum: measure the singular values of a shared map, too.
        """
        counts = counts.to(self.bank.base.device)
        stale = torch.zeros_like(counts) if self.stale_for is None else self.stale_for
        self.stale_for = torch.where(counts > 0, 0, stale.to(counts) + steps)
        waited = self.stale_for.double()
        described = {"staleness": waited.mean(), "max_staleness": waited.max()}
        shared_map = None
        if self.start is not None:
            W = self.bank.matrix()
            described["start_distance"] = (W - self.start).norm() / self.start.norm()
            if self.bank.base.shape[-1] == self.bank.width:
                described["identity_distance"] = self.bank.identity_distance()
            if self.bank.shared and spectrum:
                diagonal = self.bank.transform == "diagonal"
                shared_map = self.bank.maps[0].detach().double() if diagonal else W
        return Observed(self._moved(counts[self.slots] > 0), described, shared_map)

    def step(
        self,
        counts: Int[Tensor, " slots"],
        *,
        steps: int = 1,
        total: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> BankStep:
        """`observe` and `bank_steps` of this bank alone."""
        return bank_steps([self.observe(counts, steps=steps)], total)[0]

    def _moved(self, drawn: Bool[Tensor, " slots"]) -> Float[Tensor, " sums"]:
        """Summed distances of drawn slots and of others, of the latter also by the shared map
        alone, and how many they are."""
        drawn = _chosen(drawn, self.watched)
        base, bias = self._base().double(), self._bias() - self.bias_before
        # e' - e = (q' - q) W + (q' (W' - W) + b' - b): the second part is shared
        moved, by_map = base - self.before.double(), bias
        if self.maps_before is not None:
            W, W_before = self._maps(), self.maps_before
            assert W is not None
            by_maps = base @ (W - W_before) + bias
            moved = moved @ W_before + by_maps
            by_map = by_maps if self.bank.shared else torch.zeros_like(bias)
        else:
            moved = moved + bias
        distance = moved.flatten(1).norm(dim=1)
        of_map = torch.zeros_like(moved).add(by_map).flatten(1).norm(dim=1)
        many = drawn.double()
        few = 1 - many
        return torch.stack([distance * many, many, distance * few, of_map * few, few]).sum(1)

    def _base(self) -> Float[Tensor, "slots inner base_width"]:
        base = self.bank.base.detach().flatten(0, self.slot_axes - 1)
        base = _chosen(base.reshape(len(base), -1, base.shape[-1]), self.watched)
        return _chosen(base, self.inside, axis=1)

    def _maps(self) -> Tensor | None:
        """W, or that of each slot; None without a map."""
        if not self.bank.maps:
            return None
        maps = self.bank.matrix().detach()
        return maps.clone() if self.bank.shared else self._of_slots(maps)

    def _bias(self) -> Float[Tensor, "*slots width"]:
        """The bias, or that of each slot; zeros without one."""
        bias = self.bank.bias
        if bias is None:
            return self.bank.base.new_zeros(self.bank.width, dtype=torch.float64)
        bias = bias.detach().double()
        return bias.clone() if self.bank.shared else self._of_slots(bias)[:, None]

    def _of_slots(self, separate: Float[Tensor, "maps ..."]) -> Float[Tensor, "slots ..."]:
        slots = self.slots.stop - self.slots.start
        return separate[self.watched.to(separate.device) // (slots // len(separate))]


@torch.no_grad()
def bank_steps(
    observed: Sequence[Observed],
    total: Callable[[Tensor], Tensor] = lambda x: x,
    spectra: Sequence[Tensor | None] | None = None,
) -> list[BankStep]:
    """What banks have observed, as numbers: one collective and one wait for all.

    Args:
        total: adds a tensor over ranks; every rank must call this together.
        spectra: the `singular_values` of the banks' maps; None: computed here.
    """
    sums = total(torch.stack([one.sums for one in observed]))
    if spectra is None:
        spectra = singular_values(observed)
    of_maps = [{} if values is None else _of_spectrum(values) for values in spectra]
    described = [one.described | of_map for one, of_map in zip(observed, of_maps, strict=True)]
    scalars = torch.stack([value for one in described for value in one.values()])
    numbers = iter(torch.cat([sums.flatten(), scalars]).tolist())
    moved = [list(islice(numbers, sums.shape[1])) for _ in observed]
    steps = []
    for one, (selected, many, unselected, by_map, few) in zip(described, moved, strict=True):
        direct = selected / max(many, 1)
        steps.append(
            BankStep(
                selected_movement=direct,
                unselected_movement=unselected / few if few else None,
                indirect_movement=by_map / few / direct if few and direct else None,
                **dict(zip(one, islice(numbers, len(one)), strict=True)),
            )
        )
    return steps


@torch.no_grad()
def singular_values(
    observed: Sequence[Observed],
    total: Callable[[Tensor], Tensor] = lambda x: x,
    mine: Callable[[int], bool] = lambda _: True,
) -> list[Tensor | None]:
    """Singular values of every observed map, the largest first, float64; None without one.

    Args:
        total: adds a tensor over ranks; every rank must call this together.
        mine: whether this rank decomposes the map of the bank of this number. One rank does each.
    """
    maps = [one.shared_map for one in observed]
    found = [None if W is None else W.new_zeros(min(W.shape)) for W in maps]
    by_shape: dict[torch.Size, list[int]] = {}
    for i, W in enumerate(maps):
        if W is not None and mine(i):
            by_shape.setdefault(W.shape, []).append(i)
    for members in by_shape.values():  # maps of one shape in one call
        stacked = torch.stack([W for i in members if (W := maps[i]) is not None])
        if stacked.ndim == 3:
            values = torch.linalg.svdvals(stacked)
        else:
            values = stacked.abs().sort(descending=True).values
        for i, one in zip(members, values, strict=True):
            found[i] = one
    there = [i for i, values in enumerate(found) if values is not None]
    if there:
        sizes = [len(values) for values in found if values is not None]
        whole = total(torch.cat([values for values in found if values is not None]))
        for i, values in zip(there, whole.split(sizes), strict=True):
            found[i] = values
    return found


def _of_spectrum(values: Float[Tensor, " rank"]) -> dict[str, Tensor]:
    return {
        "condition": values[0] / values[-1],
        "stable_rank": stable_rank(values),
        "effective_rank": effective_rank(values),
    }


def _chosen(x: Tensor, indices: Int[Tensor, " chosen"], axis: int = 0) -> Tensor:
    """x at sorted, different indices of an axis: x itself where these are all."""
    if len(indices) == x.shape[axis]:
        return x
    return x.index_select(axis, indices.to(x.device))


def _spread(number: int, room: int) -> Tensor:
    """Evenly spread indices below `number`, as many as there is room for."""
    few = max(1, min(number, room))
    return torch.linspace(0, number - 1, few, dtype=torch.float64).round().long()
