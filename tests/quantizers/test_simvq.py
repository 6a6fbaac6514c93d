"""SimVQ against the naive formula of its paper (arXiv:2411.02038) in float64, and its theory."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from simvq_moe import VQ, SimVQ
from simvq_moe.core.bank import Transform
from simvq_moe.core.state import held_tensors
from simvq_moe.quantizers import RunningMapVQ


def naive_simvq(
    z: Tensor, q: Tensor, W: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """i* = argmin |z - (q_i W + b)|, z + sg(e - z), |e - sg z|^2 and |z - sg e|^2 as means."""
    book = q @ W + b
    ids = (z[..., None, :] - book).square().sum(-1).argmin(-1)
    e = book[ids]
    codebook, commitment = (e - z.detach()).square().mean(), (z - e.detach()).square().mean()
    return ids, z + (e - z).detach(), codebook, commitment


def random_simvq(codes: int = 40, width: int = 6, **options: Any) -> SimVQ:
    torch.manual_seed(0)
    quantizer = SimVQ(codes, width, **options).double()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return quantizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"transform": "diagonal"},
        {"bias": True},
        {"train_base": True},
        {"transform": "none", "bias": True},
        {"base_width": 4},
        {"base_width": 9, "train_base": True, "bias": True},
        {"codebook_weight": 0.3, "commitment_weight": 2.0},
    ],
)
def test_values_losses_and_gradients_equal_the_naive_formula(options: dict[str, Any]) -> None:
    quantizer = random_simvq(**options)
    bank = quantizer.bank
    beta = options.get("codebook_weight", 1.0)
    gamma = options.get("commitment_weight", 0.25)
    z = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 5, 6, dtype=torch.float64)

    out = quantizer(z)
    (out.loss + (out.z_q - target).square().mean()).backward()
    found = [z.grad, *(parameter.grad for parameter in quantizer.parameters())]

    z.grad = None
    quantizer.zero_grad()
    W = torch.eye(6, dtype=torch.float64) if bank.W is None else bank.W
    W = torch.diag(W) if W.ndim == 1 else W
    b = torch.zeros(6, dtype=torch.float64) if bank.bias is None else bank.bias
    ids, z_q, codebook, commitment = naive_simvq(z, bank.base, W, b)
    loss = beta * codebook + gamma * commitment
    (loss + (z_q - target).square().mean()).backward()

    assert out.ids.dtype == torch.int64
    assert torch.equal(out.ids, ids)
    assert_close(out.z_q, z_q)
    assert_close(out.loss, loss)
    assert_close(out.losses, {"codebook": codebook, "commitment": commitment})
    assert_close(found, [z.grad, *(parameter.grad for parameter in quantizer.parameters())])


def test_decode_of_the_ids_is_the_forward_value_before_and_after_folding() -> None:
    quantizer = random_simvq(bias=True)
    z = torch.randn(4, 7, 6, dtype=torch.float64)
    out, folded = quantizer(z), quantizer.fold()
    assert isinstance(folded, VQ)
    assert torch.equal(quantizer.decode(out.ids), out.z_q)
    assert torch.equal(quantizer.encode(z), out.ids)
    assert torch.equal(folded.encode(z), out.ids)
    assert_close(folded.decode(out.ids), out.z_q)
    assert_close(folded.codebook(), quantizer.codebook())
    assert_close(folded(z).loss, out.loss)


@pytest.mark.parametrize("family", [SimVQ, RunningMapVQ])
def test_all_of_what_is_folded_lies_on_the_device_of_the_codes(
    family: type[SimVQ | RunningMapVQ],
) -> None:
    with torch.device("meta"):
        quantizer = family(40, 6)
    folded = quantizer.fold()
    tensors = (*folded.state_dict().values(), *held_tensors(folded))
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize(("family", "moved"), [(VQ, 1), (SimVQ, 40)])
def test_one_step_on_one_selected_row_moves_one_code_of_vq_and_all_of_simvq(
    family: type[VQ] | type[SimVQ], moved: int
) -> None:
    torch.manual_seed(0)
    quantizer = family(40, 6).double()
    before = quantizer.codebook().detach().clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    quantizer(before[3:4] + 0.01).loss.backward()
    optimizer.step()
    difference = (quantizer.codebook() - before).norm(dim=1)
    assert int((difference > 0).sum()) == moved


@pytest.mark.parametrize("train_base", [False, True])
def test_the_update_equation_holds_to_second_order(train_base: bool) -> None:
    """e_i <- e_i - eta (G_i W^T W + q_i sum_j q_j^T G_j), remainder eta^2 (dL/dq_i)(dL/dW)."""
    errors, rates = [], [1e-1, 1e-2, 1e-3]
    for eta in rates:
        quantizer = random_simvq(train_base=train_base)
        bank = quantizer.bank
        assert bank.W is not None
        z = torch.randn(30, 6, dtype=torch.float64)
        q, W = bank.base.detach().clone(), bank.W.detach().clone()
        out = quantizer(z)
        G = torch.zeros(40, 6, dtype=torch.float64)
        G.index_add_(0, out.ids, 2 * (out.z_q - z) / z.numel())
        out.losses["codebook"].backward()
        torch.optim.SGD(quantizer.parameters(), lr=eta).step()
        predicted = q @ W - eta * (q @ (q.T @ G) + (G @ W.T @ W if train_base else 0))
        errors.append(float((bank.rows() - predicted).detach().norm()))
        if train_base:
            remainder = eta**2 * (G @ W.T) @ (q.T @ G)
            assert_close(bank.rows().detach() - predicted, remainder)
    if train_base:
        slopes = [math.log10(a / b) for a, b in pairwise(errors)]
        assert slopes == pytest.approx([2, 2], abs=1e-3)
    else:
        assert max(errors) < 1e-14


@pytest.mark.parametrize("transform", ["none", "diagonal", "linear"])
def test_simvq_and_vq_start_from_the_same_codebook(transform: Transform) -> None:
    torch.manual_seed(3)
    plain = VQ(16, 4).codebook()
    torch.manual_seed(3)
    assert torch.equal(SimVQ(16, 4, transform=transform).codebook(), plain)
