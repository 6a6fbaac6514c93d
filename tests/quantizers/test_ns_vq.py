"""NS-VQ: its loss is that of the authors' code, and idle codes follow a drift."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from simvq_moe import VQ
from simvq_moe.quantizers import NSVQ

WIDTH = 4


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("weight", [0.01, 0.5])
def test_loss_and_gradient_are_those_of_the_authors_code(temperature: float, weight: float) -> None:
    torch.manual_seed(0)
    quantizer = NSVQ(12, WIDTH, temperature=temperature, neighbour_weight=weight).double()
    z = torch.randn(30, WIDTH).double()
    out = quantizer(z)
    # CAIR-LAB-WFUSM/NS-VQ-TransVQ, CelebA/models/vq_vae.py: the embedding loss with mem_flag
    E = quantizer.bank.base
    square = torch.cdist(z, E.detach()).square()
    winner = torch.nn.functional.one_hot(square.argmin(1), len(E))
    soft = weight * len(E) * (-square / temperature).softmax(1)
    combined = (soft * (1 - winner) + winner).clamp(0, 1)
    errors = (z[:, None] - E).square().mean(-1)
    expected = (combined * errors).sum() / len(z)
    found = out.losses["codebook"] + out.losses["neighbour"]
    assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, E)[0] for loss in (found, expected)]
    assert_close(*gradients)
    assert_close(out.loss, expected + 0.25 * out.losses["commitment"])


def test_the_temperature_halves_in_steps_and_its_loss_vanishes_with_it() -> None:
    torch.manual_seed(0)
    quantizer, z = NSVQ(12, WIDTH, halving=2), torch.randn(30, WIDTH)
    terms = [float(quantizer(z).losses["neighbour"].detach()) for _ in range(9)]
    assert terms == sorted(terms, reverse=True)
    same = NSVQ(12, WIDTH, temperature=1 / 16)
    same.bank.load_state_dict(quantizer.bank.state_dict())
    assert float(same(z).losses["neighbour"].detach()) == pytest.approx(terms[8])
    quantizer.step.fill_(10**6)
    assert float(quantizer(z).losses["neighbour"].detach()) == 0


def test_codes_that_nothing_draws_follow_a_drift_which_leaves_those_of_vq_behind() -> None:
    used = {}
    for kind in (VQ, NSVQ):
        torch.manual_seed(0)
        quantizer = kind(64, WIDTH)
        if isinstance(quantizer, NSVQ):
            quantizer.temperature = 10.0  # the squared distance that codes are left behind
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.03)
        for step in range(400):
            z = torch.randn(256, WIDTH) + 5 * min(step / 200, 1)
            optimizer.zero_grad()
            quantizer(z).loss.backward()
            optimizer.step()
        used[kind] = len(quantizer.encode(torch.randn(4096, WIDTH) + 5).unique()) / 64
    assert used[VQ] < 0.5
    assert used[NSVQ] > 0.9
