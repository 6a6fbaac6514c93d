"""Balance losses against their definitions."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from simvq_moe.moe.balance import load_balance_loss, mean_losses, z_loss
from simvq_moe.moe.router import Routing


def counts(ids: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.bincount(ids.flatten(), minlength=experts)


def test_load_balance_loss_is_1_when_even_and_its_definition_otherwise() -> None:
    even = torch.zeros(6, 3, dtype=torch.float64)
    ids = torch.arange(6)[:, None] % 3
    assert_close(load_balance_loss(even, counts(ids, 3)), torch.ones(()).double())
    logits = torch.randn(6, 3, dtype=torch.float64)
    ids = logits.topk(2).indices
    share = [float((ids == i).sum()) / 12 for i in range(3)]
    probability = logits.softmax(-1).mean(0)
    expected = 3 * sum(share[i] * probability[i] for i in range(3))
    assert_close(load_balance_loss(logits, counts(ids, 3)), expected)


def test_only_probabilities_carry_the_gradient_and_it_lowers_the_loaded_expert() -> None:
    logits = torch.zeros(4, 2, requires_grad=True)
    loss = load_balance_loss(logits, torch.tensor([4, 0]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1] < 0).all()


def test_z_loss_is_the_mean_squared_logsumexp() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64)
    expected = sum(float(row.exp().sum().log()) ** 2 for row in logits) / 5
    assert_close(z_loss(logits), torch.tensor(expected, dtype=torch.float64))


def test_the_losses_of_a_model_are_the_means_over_its_layers() -> None:
    logits = torch.randn(2, 6, 4, dtype=torch.float64)
    routings = [Routing(x.topk(2).indices, x.topk(2).values.softmax(-1), x, {}) for x in logits]
    losses = mean_losses(routings, all_ranks=False)
    balance = [load_balance_loss(r.logits, counts(r.ids, 4)) for r in routings]
    assert_close(losses["balance"], (balance[0] + balance[1]) / 2)
    assert_close(losses["z"], (z_loss(logits[0]) + z_loss(logits[1])) / 2)
