"""The same ids and values as vector-quantize-pytorch, wherever the definitions agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from simvq_moe import EMAVQ, FSQ, LFQ, VQ, ResidualQuantizer, SimVQ
from simvq_moe.core.gradient import rotation
from simvq_moe.quantizers import BSQ

peer: Any = pytest.importorskip("vector_quantize_pytorch")


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [3, 4, 7], [16, 16]])
def test_fsq(levels: list[int]) -> None:
    torch.manual_seed(0)
    z = 2 * torch.randn(1, 200, len(levels))
    theirs, ids = peer.FSQ(levels)(z)
    out = FSQ(levels)(z)
    assert torch.equal(out.ids, ids.long())
    assert_close(out.z_q, theirs)


@pytest.mark.parametrize(("family", "spherical"), [(LFQ, False), (BSQ, True)])
def test_lfq(family: type[LFQ], spherical: bool) -> None:
    torch.manual_seed(0)
    z = torch.randn(1, 200, 6)
    theirs = peer.LFQ(dim=6, spherical=spherical, commitment_loss_weight=0.25)
    quantized, ids, _ = theirs(z, inv_temperature=1.0)
    loss = theirs(z, inv_temperature=1.0, return_loss_breakdown=True)[1]
    out = family(6, temperature=1.0)(z)
    assert torch.equal(out.ids, ids)
    assert_close(out.z_q, quantized)
    # theirs clamps probabilities at 1e-5 before the logarithm
    for name, term in [
        ("token_entropy", loss.per_sample_entropy),
        ("codebook_entropy", loss.batch_entropy),
    ]:
        assert_close(out.losses[name], term, rtol=1e-3, atol=1e-3)
    assert_close(out.losses["commitment"], loss.commitment)


def test_simvq() -> None:
    torch.manual_seed(0)
    theirs = peer.SimVQ(dim=8, codebook_size=64, rotation_trick=False)
    ours = SimVQ(64, 8)
    assert ours.bank.W is not None
    with torch.no_grad():
        ours.bank.base.copy_(theirs.frozen_codebook)
        ours.bank.W.copy_(theirs.code_transform.weight.T)
    z = torch.randn(3, 50, 8, requires_grad=True)
    quantized, ids, loss = theirs(z)
    out = ours(z)
    assert torch.equal(out.ids, ids)
    assert_close(out.z_q, quantized)
    assert_close(out.loss, loss)
    (gradient,) = torch.autograd.grad(loss, [theirs.code_transform.weight])
    assert_close(torch.autograd.grad(out.loss, [ours.bank.W])[0], gradient.T)


def test_rotation_trick() -> None:
    from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

    torch.manual_seed(0)
    z, e, g = torch.randn(3, 100, 8, dtype=torch.float64)
    z.requires_grad_()
    e = e * 0.5  # keeps the gain below our bound
    keep = (e.norm(dim=1) < 9 * z.norm(dim=1)).detach()
    theirs: Any = rotate_to(z, e)
    ours = rotation(z, e)
    assert_close(ours, theirs)
    a, b = (torch.autograd.grad((x * g).sum(), z)[0] for x in (ours, theirs))
    assert_close(a[keep], b[keep])


def test_residual_vq() -> None:
    torch.manual_seed(0)
    theirs = peer.ResidualVQ(dim=4, codebook_size=16, num_quantizers=3).eval()
    levels = [VQ(16, 4) for _ in range(3)]
    for level, layer in zip(levels, theirs.layers, strict=True):
        with torch.no_grad():
            level.bank.base.copy_(layer.codebook)
    z = torch.randn(2, 50, 4)
    quantized, ids, _ = theirs(z)
    out = ResidualQuantizer(levels)(z)
    assert torch.equal(out.ids, ids)
    assert_close(out.z_q, quantized)


def test_ema() -> None:
    torch.manual_seed(0)
    options = {"decay": 0.9, "kmeans_init": False, "threshold_ema_dead_code": 0}
    theirs = peer.VectorQuantize(dim=4, codebook_size=16, **options, eps=1e-5)
    ours = EMAVQ(16, 4, decay=0.9)
    start = theirs.codebook.detach().clone()
    ours.codes_now.copy_(start)
    ours.sums.copy_(start)
    # theirs starts with counts of one and sums of one code each as well
    theirs._codebook.cluster_size.fill_(1)
    theirs._codebook.embed_avg.copy_(start)
    for _ in range(3):
        z = torch.randn(1, 200, 4)
        quantized, ids, _ = theirs(z)
        out = ours(z)
        assert torch.equal(out.ids, ids)
        assert_close(out.z_q, quantized)
        assert_close(ours.codebook(), theirs.codebook)
