"""Balance losses against their definitions."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from simvq_moe.moe.balance import load_balance_loss, z_loss


def test_load_balance_loss_is_1_when_even_and_its_definition_otherwise() -> None:
    even = torch.zeros(6, 3, dtype=torch.float64)
    ids = torch.arange(6)[:, None] % 3
    assert_close(load_balance_loss(even, ids, all_ranks=False), torch.ones(()).double())
    logits = torch.randn(6, 3, dtype=torch.float64)
    ids = logits.topk(2).indices
    share = [float((ids == i).sum()) / 12 for i in range(3)]
    probability = logits.softmax(-1).mean(0)
    expected = 3 * sum(share[i] * probability[i] for i in range(3))
    assert_close(load_balance_loss(logits, ids, all_ranks=False), expected)


def test_only_probabilities_carry_the_gradient_and_it_lowers_the_loaded_expert() -> None:
    logits = torch.zeros(4, 2, requires_grad=True)
    loss = load_balance_loss(logits, torch.zeros(4, 1, dtype=torch.int64), all_ranks=False)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1] < 0).all()


def test_z_loss_is_the_mean_squared_logsumexp() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64)
    expected = sum(float(row.exp().sum().log()) ** 2 for row in logits) / 5
    assert_close(z_loss(logits), torch.tensor(expected, dtype=torch.float64))
