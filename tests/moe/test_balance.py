"""Balance losses and selection biases against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from simvq_moe.config.moe import MoEConfig
from simvq_moe.core.step_state import after_step
from simvq_moe.core.usage import usage
from simvq_moe.moe.balances.base import load_balance_loss
from simvq_moe.moe.balances.loss_free import LossFreeBalance, LossFreeBias
from simvq_moe.moe.balances.quantile import QuantileBalance, QuantileBias
from simvq_moe.moe.losses import mean_losses, z_loss
from simvq_moe.moe.routers.base import Router, Routing


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


def test_losses_of_no_tokens_are_0_with_a_gradient_of_0() -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    for loss in (load_balance_loss(logits, torch.zeros(3, dtype=torch.int64)), z_loss(logits)):
        assert_close(loss, torch.zeros(()))
        assert torch.autograd.grad(loss, logits)[0].shape == (0, 3)


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


def test_loss_free_biases_move_by_the_rate_against_the_load_of_the_whole_step() -> None:
    bias = LossFreeBias(4, rate=0.1)
    scores = torch.tensor([[0.9, 0.1, 0.2, 0.0], [0.8, 0.0, 0.1, 0.2]])
    for part in scores.split(1):  # two micro-batches
        assert_close(bias.choose(part, 2), part.topk(2).indices)
    assert_close(bias.bias, torch.zeros(4))  # nothing moves within a step
    after_step(bias)  # counts 2, 0, 1, 1
    assert_close(bias.bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]))
    assert_close(bias.choose(torch.tensor([[0.6, 0.45, 0.2, 0.0]]), 1), torch.tensor([[1]]))
    bias.eval().choose(scores, 2)
    bias.train()
    assert float(bias.pending.sum()) == 1


def test_quantile_biases_are_the_quantiles_of_the_scores_that_would_have_been_needed() -> None:
    torch.manual_seed(0)
    experts, top_k = 6, 2
    bias = QuantileBias(experts, top_k).double()
    bias.bias += 0.1 * torch.randn(experts)
    scores = torch.rand(3000, experts, dtype=torch.float64) + torch.arange(experts) / 10
    start = bias.bias.clone()
    for part in scores.split(1000):
        assert_close(bias.choose(part, top_k), (part + start).topk(top_k).indices)
    after_step(bias)
    threshold = (scores + start).sort(dim=-1, descending=True).values[:, top_k]
    needed = (threshold[:, None] - scores).quantile(top_k / experts, dim=0)
    # bins are 3.6 % wide
    assert_close(bias.bias, needed - needed.mean(), rtol=0.036, atol=1e-3)


def skewed(balance: Any, gates: Any) -> tuple[Router, torch.Tensor]:
    """A router whose input leans to one side, so that a few experts get most tokens."""
    torch.manual_seed(0)
    layer = MoEConfig(experts=16, top_k=2, gates=gates)
    router: Router = layer.router.build(16, layer, None)
    router.selection = balance.biases(16, 2)
    return router, torch.randn(2000, 16) + torch.randn(16)


@pytest.mark.parametrize("gates", ["softmax_topk", "topk_softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("balance", "steps"), [(LossFreeBalance(rate=0.002), 500), (QuantileBalance(), 5)]
)
def test_biases_even_out_a_skewed_router_and_leave_its_gates_alone(
    balance: Any, steps: int, gates: Any
) -> None:
    router, x = skewed(balance, gates)
    before = usage(router(x).counts)
    after_step(router)
    for _ in range(steps - 1):
        router(x)
        after_step(router)
    routing = router.eval()(x)
    assert before.max_vio > 4
    assert usage(routing.counts).max_vio < 0.25
    assert_close(routing.gates, router.gates_of(routing.logits, routing.ids))
    assert (routing.ids != routing.logits.topk(2).indices).any()
