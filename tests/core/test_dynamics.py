"""Movement of selected and unselected rows, and the state of W, on live quantizers."""

from __future__ import annotations

import pytest
import torch

from simvq_moe import VQ, SimVQ
from simvq_moe.core.bank import Bank
from simvq_moe.core.dynamics import BankDynamics, BankStep


def one_step(quantizer: VQ | SimVQ) -> BankStep:
    """Dynamics of one gradient step on a batch near the first three codes."""
    dynamics = BankDynamics(quantizer.bank)
    quantizer(quantizer.codebook()[:3].detach() + 0.01).losses["codebook"].backward()
    torch.optim.SGD(quantizer.parameters(), lr=1.0).step()
    return dynamics.step(quantizer.counter.take())


def test_free_rows_move_only_when_selected_and_mapped_rows_move_all() -> None:
    torch.manual_seed(0)
    plain, mapped = one_step(VQ(20, 6)), one_step(SimVQ(20, 6))
    assert plain.selected_movement > 0
    assert plain.unselected_movement == 0
    assert plain.indirect_movement == 0
    assert 0.1 < mapped.indirect_movement < 1.5
    assert mapped.indirect_movement == mapped.unselected_movement / mapped.selected_movement


def test_movement_is_the_mean_distance_that_rows_went() -> None:
    bank = Bank(torch.zeros(4, 3), transform="none")
    dynamics = BankDynamics(bank)
    with torch.no_grad():
        bank.base += torch.tensor([[3.0, 4, 0], [0, 0, 1], [0, 0, 3], [0, 0, 0]])
    step = dynamics.step(torch.tensor([2, 0, 0, 0]))
    assert step.selected_movement == 5
    assert step.unselected_movement == pytest.approx(4 / 3)
    assert dynamics.step(torch.tensor([1, 1, 1, 1])).unselected_movement == 0


def test_staleness_counts_steps_since_the_last_draw() -> None:
    dynamics = BankDynamics(Bank(torch.randn(3, 2)))
    dynamics.step(torch.tensor([1, 0, 0]))
    dynamics.step(torch.tensor([0, 2, 0]))
    step = dynamics.step(torch.tensor([0, 1, 0]))
    assert dynamics.stale_for.tolist() == [2, 0, 3]
    assert step.staleness == pytest.approx(5 / 3)
    assert step.max_staleness == 3


@pytest.mark.parametrize("transform", ["diagonal", "linear"])
def test_the_map_is_described_by_its_spectrum(transform: str) -> None:
    bank = Bank(torch.randn(5, 3), transform="linear" if transform == "linear" else "diagonal")
    dynamics = BankDynamics(bank)
    assert bank.W is not None
    fresh = dynamics.step(torch.ones(5, dtype=torch.int64))
    assert fresh.start_distance == 0
    assert fresh.condition == pytest.approx(1)
    assert fresh.stable_rank == pytest.approx(3)
    assert fresh.effective_rank == pytest.approx(3)
    values = torch.tensor([4.0, 2.0, 2.0])
    with torch.no_grad():
        bank.W.copy_(values if transform == "diagonal" else torch.diag(values))
    step = dynamics.step(torch.ones(5, dtype=torch.int64))
    assert step.condition == pytest.approx(2)
    assert step.stable_rank == pytest.approx(24 / 16)
    assert step.effective_rank == pytest.approx(2**1.5)
    assert step.start_distance == pytest.approx((11 / 3) ** 0.5)


def test_a_large_bank_is_followed_in_a_spread_of_its_rows() -> None:
    bank = Bank(torch.randn(1000, 2))
    dynamics = BankDynamics(bank, max_rows=10)
    assert dynamics.watched.tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert len(dynamics.before) == 10


def test_rows_of_experts_count_as_one_slot_each() -> None:
    bank = Bank(torch.randn(4, 3, 2))
    dynamics = BankDynamics(bank)
    with torch.no_grad():
        bank.base[1] += 1
    step = dynamics.step(torch.tensor([0, 5, 0, 0]))
    assert step.selected_movement == pytest.approx(6**0.5, rel=1e-6)
    assert step.unselected_movement == 0
