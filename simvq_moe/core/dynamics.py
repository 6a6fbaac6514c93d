"""How a bank moves: the analysis behind SimVQ (arXiv:2411.02038, section 4) as a measurement.

One step on the shared map moves every row, those that the batch selected and those that it did not:
e_i <- e_i - eta (G_i W^T W + q_i sum_j q_j^T G_j). `BankDynamics` measures both movements on a live
model, and what becomes of W meanwhile: its spectrum, ranks, condition and distance from the start.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from simvq_moe.core.bank import Bank, effective_rank, stable_rank


@dataclass(frozen=True)
class BankStep:
    """One step of a bank; movements are mean Euclidean distances that rows went since the last."""

    selected_movement: float
    """Rows drawn in this step; 0 if there are none."""
    unselected_movement: float
    """Rows not drawn in this step: moved by others' errors alone; 0 if there are none."""
    indirect_movement: float
    """unselected_movement / selected_movement: 0 for free rows, near 1 under a strong coupling."""
    staleness: float
    """Mean number of steps since a row was last drawn."""
    max_staleness: float
    """The largest number of steps since a row was last drawn."""
    start_distance: float
    """|W - W at the start| / |W at the start|, Frobenius."""
    condition: float
    """Largest over smallest singular value of W."""
    stable_rank: float
    """Squared Frobenius norm of W over its squared spectral norm."""
    effective_rank: float
    """exp of the entropy of W's normalized singular values."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class BankDynamics:
    """Follows one bank from step to step.

    Args:
        bank: a live bank; the first axis of its rows names the slots (codes or experts).
        max_rows: slots whose movement is followed, evenly spread; bounds the copy that is kept.
    """

    def __init__(self, bank: Bank, *, max_rows: int = 4096) -> None:
        self.bank = bank
        slots = len(bank.base)
        watched = torch.linspace(0, slots - 1, min(slots, max_rows), dtype=torch.float64)
        self.watched = watched.round().long().to(bank.base.device)
        self.before = self._rows()
        self.start = bank.matrix().detach().clone() if bank.maps else None
        self.stale_for = torch.zeros(slots, dtype=torch.int64, device=bank.base.device)

    @torch.no_grad()
    def step(self, counts: Int[Tensor, " slots"]) -> BankStep:
        """Measure after an optimizer step.

        Args:
            counts: draws of each slot in the batch of that step, summed over ranks.
        """
        drawn = counts > 0
        self.stale_for = torch.where(drawn, 0, self.stale_for + 1)
        rows = self._rows()
        distance, selected = (rows - self.before).norm(dim=1), drawn[self.watched]
        self.before = rows
        direct, indirect = _mean(distance[selected]), _mean(distance[~selected])
        return BankStep(
            selected_movement=direct,
            unselected_movement=indirect,
            indirect_movement=indirect / direct if direct > 0 else 0.0,
            staleness=_mean(self.stale_for.double()),
            max_staleness=float(self.stale_for.max()),
            **self._map(),
        )

    def _rows(self) -> Tensor:
        return self.bank.lookup(self.watched, torch.float64).detach().flatten(1)

    def _map(self) -> dict[str, float]:
        """Measures of W; those of the identity for a bank without a map."""
        if self.start is None:
            width = float(self.bank.width)
            return {
                "start_distance": 0.0,
                "condition": 1.0,
                "stable_rank": width,
                "effective_rank": width,
            }
        spectrum = self.bank.spectrum()
        moved = (self.bank.matrix().detach() - self.start).norm() / self.start.norm()
        return {
            "start_distance": float(moved),
            "condition": float(spectrum[0] / spectrum[-1]),
            "stable_rank": stable_rank(spectrum),
            "effective_rank": effective_rank(spectrum),
        }


def _mean(x: Tensor) -> float:
    return float(x.mean()) if len(x) else 0.0
