"""A bank's algebra: rows = base @ W + b, whichever way its rows are reached."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from simvq_moe.core.bank import Bank, Transform

TRANSFORMS: list[Transform] = ["none", "diagonal", "linear"]


def bank_of(transform: Transform, *, rows: int = 7, width: int = 5, bias: bool = True) -> Bank:
    torch.manual_seed(0)
    bank = Bank(torch.randn(rows, width, dtype=torch.float64), transform=transform, bias=bias)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return bank


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_rows_equal_the_naive_product(transform: Transform) -> None:
    bank = bank_of(transform)
    assert bank.bias is not None
    W = torch.eye(5).double() if bank.W is None else bank.W
    W = torch.diag(W) if W.ndim == 1 else W
    assert_close(bank.rows(), bank.base @ W + bank.bias)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_lookup_score_pull_and_fold_agree_with_rows(transform: Transform) -> None:
    bank = bank_of(transform)
    x, ids = torch.randn(3, 5, dtype=torch.float64), torch.tensor([[0, 6], [6, 2]])
    assert_close(bank.lookup(ids), bank.rows()[ids])
    assert_close(bank.score(x), x @ bank.rows().T)
    assert_close((bank.pull(x) * bank.base[:3]).sum(-1), (x * bank.map(bank.base[:3])).sum(-1))
    folded = bank.fold()
    assert_close(folded.rows(), bank.rows())
    assert folded.W is None
    assert folded.bias is None


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_step_zero_equals_the_bank_without_a_map(transform: Transform) -> None:
    base = torch.randn(4, 6)
    assert torch.equal(Bank(base, transform=transform, bias=True).rows(), base)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_map_and_bias_lie_where_the_base_does(transform: Transform) -> None:
    bank = Bank(torch.randn(4, 6, device="meta"), transform=transform, bias=True)
    assert {p.device.type for p in bank.parameters()} == {"meta"}


@given(base_width=st.integers(1, 8), width=st.integers(1, 8))
def test_a_map_between_widths_starts_semi_orthogonal(base_width: int, width: int) -> None:
    W = Bank(torch.randn(2, base_width).double(), width=width).W
    assert W is not None
    gram = W @ W.T if base_width <= width else W.T @ W
    assert_close(gram, torch.eye(min(base_width, width)).double())


def test_map_follows_a_weighted_sum_over_rows() -> None:
    bank = bank_of("linear", bias=False)
    gates = torch.rand(3, 7, dtype=torch.float64)
    assert_close(bank.map(gates @ bank.base), gates @ bank.rows())


def test_rows_keep_leading_axes_and_a_frozen_base_is_no_parameter() -> None:
    bank = Bank(torch.randn(4, 3, 5), width=6, train_base=False)
    assert bank.rows().shape == (4, 3, 6)
    assert [name for name, _ in bank.named_parameters()] == ["W"]
    assert "base" in bank.state_dict()


@pytest.mark.parametrize("transform", ["diagonal", "linear"])
def test_the_distance_from_the_identity_is_zero_at_the_start(transform: Transform) -> None:
    bank = Bank(torch.randn(4, 5), transform=transform)
    assert bank.W is not None
    assert bank.identity_distance() == 0
    with torch.no_grad():
        bank.W.mul_(-2)
    assert float(bank.identity_distance()) == pytest.approx(3.0)


def test_an_impossible_map_names_the_way_out() -> None:
    with pytest.raises(ValueError, match="base_width 3 != width 4"):
        Bank(torch.randn(2, 3), width=4, transform="diagonal")


def test_folded_rows_are_kept_until_the_map_changes_however_it_is_written() -> None:
    bank = Bank(torch.randn(6, 3), train_base=False, bias=True).eval()
    assert bank.W is not None
    assert bank.bias is not None
    first = bank.folded_rows(torch.float32)
    assert bank.folded_rows(torch.float32) is first
    assert not first.requires_grad
    for tensor in (bank.W.data, bank.bias.data, bank.base, bank.base.data):
        tensor.mul_(1.5).add_(0.1)
        assert_close(bank.folded_rows(torch.float32), bank.rows().detach())
    assert bank.folded_rows(torch.float64).dtype == torch.float64
    bank.load_state_dict(Bank(torch.randn(6, 3), train_base=False, bias=True).state_dict())
    assert_close(bank.folded_rows(torch.float32), bank.rows().detach())
    learned = Bank(torch.randn(6, 3), train_base=True).eval()
    learned.folded_rows(torch.float32)
    learned.base.data.add_(1)
    assert_close(learned.folded_rows(torch.float32), learned.rows().detach())


def test_a_bank_without_a_map_cannot_match_moments() -> None:
    with pytest.raises(ValueError, match="give it both"):
        Bank(torch.randn(6, 3)).match(torch.zeros(3), torch.eye(3))
