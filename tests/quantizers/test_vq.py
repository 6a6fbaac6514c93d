"""VQ and EMA-VQ against their formulas (arXiv:1711.00937, eq. 3 and appendix A.1)."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from simvq_moe import EMAVQ, VQ


def test_vq_equals_the_naive_formula() -> None:
    torch.manual_seed(0)
    quantizer = VQ(30, 5, codebook_weight=0.7, commitment_weight=0.4).double()
    z = torch.randn(20, 5, dtype=torch.float64, requires_grad=True)
    out = quantizer(z)
    book = quantizer.codebook()
    ids = torch.cdist(z, book).argmin(1)
    e = book[ids]
    assert torch.equal(out.ids, ids)
    assert torch.equal(out.z_q, e)
    naive = 0.7 * (e - z.detach()).square().mean() + 0.4 * (z - e.detach()).square().mean()
    assert_close(out.loss, naive)
    inputs = [z, *quantizer.parameters()]
    assert_close(torch.autograd.grad(out.loss, inputs), torch.autograd.grad(naive, inputs))


def test_ema_codes_follow_the_recursion_slot_by_slot() -> None:
    torch.manual_seed(0)
    decay, epsilon, codes = 0.9, 1e-2, 6
    quantizer = EMAVQ(codes, 3, decay=decay, epsilon=epsilon).double()
    sums = quantizer.codebook().clone()
    counts = torch.ones(codes, dtype=torch.float64)
    for _ in range(5):
        z = torch.randn(11, 3, dtype=torch.float64)
        book = quantizer.codebook().clone()
        ids = torch.cdist(z, book).argmin(1)
        out = quantizer(z)
        assert torch.equal(out.ids, ids)
        assert torch.equal(out.z_q, book[ids])
        for i in range(codes):
            chosen = z[ids == i]
            sums[i] = decay * sums[i] + (1 - decay) * chosen.sum(0)
            counts[i] = decay * counts[i] + (1 - decay) * len(chosen)
        total = counts.sum()
        smoothed = (counts + epsilon) / (total + codes * epsilon) * total
        assert_close(quantizer.codebook(), sums / smoothed[:, None])


def test_ema_has_only_the_commitment_loss_and_no_learned_parameter() -> None:
    quantizer = EMAVQ(8, 3)
    z = torch.randn(10, 3, requires_grad=True)
    out = quantizer(z)
    assert list(out.losses) == ["commitment"]
    assert_close(out.loss, 0.25 * (z - out.z_q).square().mean())
    assert list(quantizer.parameters()) == []


def test_ema_codes_stand_still_in_evaluation() -> None:
    quantizer = EMAVQ(8, 3).eval()
    before = quantizer.codebook().clone()
    quantizer(torch.randn(10, 3))
    assert torch.equal(quantizer.codebook(), before)


def test_an_ema_code_that_is_never_selected_stays_where_it_is() -> None:
    torch.manual_seed(0)
    quantizer = EMAVQ(2, 2, decay=0.5).double()
    near, far = quantizer.codebook().clone()
    for _ in range(4):
        quantizer(near[None] + 0.01 * torch.randn(5, 2).double())
    # smoothing alone moves it: epsilon is 1e-5 draws against a count of 2^-4
    assert_close(quantizer.codebook()[1], far, rtol=1e-3, atol=1e-3)
