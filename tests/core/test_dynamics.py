"""Movement of selected and unselected rows, and the state of W, on live quantizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simvq_moe import VQ, SimVQ
from simvq_moe.core.bank import Bank
from simvq_moe.core.dynamics import BankDynamics, BankStep, bank_steps, singular_values
from simvq_moe.quantizers import GroupVQ


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
    assert mapped.unselected_movement is not None
    assert mapped.indirect_movement is not None
    assert 0.1 < mapped.indirect_movement < 1.5
    # nothing but the map moves frozen rows
    expected = mapped.unselected_movement / mapped.selected_movement
    assert mapped.indirect_movement == pytest.approx(expected)


@torch.no_grad()
@pytest.mark.parametrize("transform", ["none", "diagonal", "linear", "low_rank", "separate"])
def test_indirect_movement_is_what_the_shared_map_does_to_idle_rows(transform: Any) -> None:
    torch.manual_seed(0)
    bank = Bank(torch.randn(4, 3, 2, dtype=torch.float64), transform=transform, rank=1)
    dynamics = BankDynamics(bank)
    before, map_before = bank.rows().detach().clone(), bank.matrix().clone()
    for p in (bank.base, *bank.maps):
        p += torch.randn_like(p)
    by_map = bank.rows()
    if transform == "separate":
        by_map = torch.zeros_like(by_map)
    else:
        by_map = by_map - bank.base @ map_before
    step = dynamics.step(torch.tensor([0, 2, 0, 0]))
    moved = (bank.rows() - before).flatten(1).norm(dim=1)
    idle = [0, 2, 3]
    assert step.selected_movement == pytest.approx(float(moved[1]))
    assert step.unselected_movement == pytest.approx(float(moved[idle].mean()))
    expected = by_map[idle].flatten(1).norm(dim=1).mean() / moved[1]
    assert step.indirect_movement == pytest.approx(float(expected))


def test_movement_is_the_mean_distance_that_rows_went() -> None:
    bank = Bank(torch.zeros(4, 3), transform="none")
    dynamics = BankDynamics(bank)
    with torch.no_grad():
        bank.base += torch.tensor([[3.0, 4, 0], [0, 0, 1], [0, 0, 3], [0, 0, 0]])
    step = dynamics.step(torch.tensor([2, 0, 0, 0]))
    assert step.selected_movement == 5
    assert step.unselected_movement == pytest.approx(4 / 3)
    assert dynamics.step(torch.tensor([1, 1, 1, 1])).unselected_movement is None


@torch.no_grad()
def test_banks_are_measured_together_as_each_alone() -> None:
    torch.manual_seed(0)
    sizes: list[tuple[Any, int]] = [("none", 3), ("linear", 3), ("linear", 5), ("linear", 3)]
    sizes += [("diagonal", 3), ("separate", 3), ("low_rank", 5)]
    banks = [Bank(torch.randn(4, width), transform=transform, rank=2) for transform, width in sizes]
    together, alone = ([BankDynamics(bank) for bank in banks] for _ in range(2))
    for bank in banks:
        for p in bank.parameters():
            p += torch.randn_like(p)
    counts = torch.tensor([0, 2, 1, 0])
    found = bank_steps([one.observe(counts) for one in together])
    for step, one in zip(found, alone, strict=True):
        expected = one.step(counts).as_dict()
        assert step.as_dict() == pytest.approx(expected, rel=1e-12)
        assert step.as_dict().keys() == expected.keys()


@torch.no_grad()
def test_ranks_take_turns_at_maps_and_each_has_all_their_singular_values() -> None:
    torch.manual_seed(0)
    kinds: list[Any] = ["none", "linear", "diagonal", "linear", "separate", "low_rank"]
    dynamics = [BankDynamics(Bank(torch.randn(4, 5), transform=kind, rank=2)) for kind in kinds]
    for one in dynamics:
        for p in one.bank.parameters():
            p += torch.randn_like(p)
    observed = [one.observe(torch.ones(4, dtype=torch.long)) for one in dynamics]
    whole = singular_values(observed)
    assert [i for i, values in enumerate(whole) if values is not None] == [1, 2, 3, 5]
    for values, one in zip(whole, dynamics, strict=True):
        if values is not None:
            torch.testing.assert_close(values, torch.linalg.svdvals(one.bank.matrix()))
    sent: list[torch.Tensor] = []
    for rank in range(2):
        singular_values(
            observed, lambda x: (sent.append(x), x)[1], lambda bank, rank=rank: bank % 2 == rank
        )
    there = torch.cat([values for values in whole if values is not None])
    assert torch.equal(sent[0] + sent[1], there)
    assert (sent[0] == 0).any()
    assert (sent[1] == 0).any()


def test_without_its_spectrum_a_map_is_measured_as_before_and_nothing_is_decomposed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dynamics = BankDynamics(Bank(torch.randn(4, 5)))
    counts = torch.ones(4, dtype=torch.long)
    monkeypatch.setattr(torch.linalg, "svdvals", None)
    (step,) = bank_steps([dynamics.observe(counts, spectrum=False)])
    assert step.start_distance == 0
    assert step.condition is step.stable_rank is step.effective_rank is None


def test_staleness_counts_steps_since_the_last_draw() -> None:
    dynamics = BankDynamics(Bank(torch.randn(3, 2)))
    dynamics.step(torch.tensor([1, 0, 0]))
    dynamics.step(torch.tensor([0, 2, 0]))
    step = dynamics.step(torch.tensor([0, 1, 0]))
    assert dynamics.stale_for is not None
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


def test_a_large_bank_is_followed_in_a_spread_of_its_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank = Bank(torch.randn(1000, 2))
    monkeypatch.setattr("simvq_moe.core.dynamics.LARGEST_COPY", 20)
    dynamics = BankDynamics(bank)
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


def test_parts_of_a_bank_give_the_movement_of_the_whole() -> None:
    torch.manual_seed(0)
    whole = Bank(torch.randn(6, 3, 2))
    parts = [Bank(whole.base[i : i + 3].detach()) for i in (0, 3)]
    followed = [BankDynamics(whole), *(BankDynamics(p, first=3 * i) for i, p in enumerate(parts))]
    moves, change = torch.randn(6, 3, 2), torch.randn(2, 2)
    with torch.no_grad():
        whole.base += moves
        for i, part in enumerate(parts):
            part.base += moves[3 * i : 3 * i + 3]
        for bank in (whole, *parts):
            assert bank.W is not None
            bank.W += change
    counts = torch.tensor([1, 0, 0, 4, 2, 0])
    sums = followed[1]._moved(counts[:3] > 0) + followed[2]._moved(counts[3:] > 0)
    of_parts = followed[1].step(counts, total=lambda _: sums[None])
    assert of_parts.as_dict() == pytest.approx(followed[0].step(counts).as_dict(), rel=1e-12)


def test_codes_in_groups_with_maps_of_their_own_are_slots_each() -> None:
    bank = Bank(torch.zeros(2, 3, 4), transform="separate")
    dynamics = BankDynamics(bank, slot_axes=2)
    with torch.no_grad():
        bank.base[1, 0] += 1
    step = dynamics.step(torch.tensor([0, 0, 0, 7, 0, 0]), steps=5)
    assert step.selected_movement == pytest.approx(2)
    assert step.unselected_movement == 0
    assert step.staleness == pytest.approx(25 / 6)


def test_the_bias_of_a_group_moves_its_codes_and_no_other() -> None:
    torch.manual_seed(0)
    quantizer = GroupVQ(6, 4, groups=2)
    dynamics = BankDynamics(quantizer.bank, slot_axes=2)
    before = quantizer.codebook().detach()
    bias, W = quantizer.bank.bias, quantizer.bank.W
    assert bias is not None
    assert W is not None
    with torch.no_grad():
        bias[1] += 3
        W[1] += 0.1 * torch.randn(4, 4)
    step = dynamics.step(torch.tensor([0, 0, 0, 7, 0, 0]))
    moved = (quantizer.codebook().detach() - before).norm(dim=1)
    assert step.selected_movement == pytest.approx(float(moved[3]), rel=1e-5)
    others = moved[[0, 1, 2, 4, 5]].mean()
    assert step.unselected_movement == pytest.approx(float(others), rel=1e-5)
    assert step.indirect_movement == 0  # nothing is shared by all
