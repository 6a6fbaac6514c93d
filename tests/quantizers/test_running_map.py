"""Codes at running moments: the formula in float64, and where learning is left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from simvq_moe import SimVQ
from simvq_moe.core.step_state import after_step, follow_steps
from simvq_moe.quantizers import RunningMapVQ

WIDTH, DECAY = 5, 0.8


def drifting(steps: int) -> list[Tensor]:
    """Batches of unequal sizes whose mean, spread and axes all change."""
    torch.manual_seed(1)
    turn = torch.randn(steps, WIDTH, WIDTH).double()
    return [torch.randn(20 + 7 * t, WIDTH).double() @ turn[t] + 3 * t - 4 for t in range(steps)]


def weighted_moments(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and covariance of all latents at once, where a batch weighs decay^age as a whole."""
    weights = [DECAY ** (len(batches) - 1 - t) for t in range(len(batches))]
    each = [torch.full((len(z),), w / len(z)) for z, w in zip(batches, weights, strict=True)]
    p = torch.cat(each).double() / sum(weights)
    z = torch.cat(batches)
    mean = p @ z
    return mean, (z - mean).T @ (p[:, None] * (z - mean))


def test_the_codes_have_the_moments_of_all_latents_so_far_under_decaying_weights() -> None:
    quantizer = RunningMapVQ(9, WIDTH, decay=DECAY).double()
    batches = drifting(6)
    quantizer.initialize(batches[0])
    assert not quantizer.waits_for_data
    seen = [batches[0]]
    for z in batches:
        quantizer(z)
        seen.append(z)
        mean, covariance = weighted_moments(seen)
        assert_close(quantizer.mean, mean)
        assert_close(quantizer.covariance, covariance)
        values, axes = torch.linalg.eigh(WIDTH * covariance)
        root = axes @ values.sqrt().diag() @ axes.T
        assert_close(quantizer.codebook(), quantizer.base @ root + mean)


def test_it_starts_where_simvq_from_data_does() -> None:
    torch.manual_seed(0)
    learned = SimVQ(64, WIDTH, init="data")
    torch.manual_seed(0)
    running = RunningMapVQ(64, WIDTH)
    z = torch.randn(200, WIDTH) @ torch.randn(WIDTH, WIDTH) + 3
    learned.initialize(z)
    running.initialize(z)
    assert_close(running.codebook(), learned.codebook().detach())


def test_nothing_is_learned_and_evaluation_moves_nothing() -> None:
    quantizer = RunningMapVQ(16, WIDTH)
    z = torch.randn(50, WIDTH, requires_grad=True)
    out = quantizer(z)
    assert list(quantizer.parameters()) == []
    assert out.losses.keys() == {"commitment"}
    (out.loss + out.z_q.sum()).backward()
    assert z.grad is not None
    before = quantizer.codebook().clone()
    quantizer.eval()(z + 5)
    assert torch.equal(quantizer.codebook(), before)


def test_a_step_of_padding_alone_leaves_everything_as_it_was() -> None:
    quantizer = RunningMapVQ(16, WIDTH)
    quantizer(torch.randn(50, WIDTH))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(torch.randn(3, WIDTH), torch.zeros(3, dtype=torch.bool))
    assert_close(dict(quantizer.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_float32_latents_far_from_the_origin_keep_the_spread(offset: float) -> None:
    quantizer = RunningMapVQ(20_000, WIDTH, decay=DECAY)
    torch.manual_seed(0)
    z = torch.randn(4000, WIDTH)
    follow_steps(quantizer)
    quantizer.initialize(z + offset)
    for _ in range(3):
        quantizer(z + offset)
        after_step(quantizer)
    codes = quantizer.codebook().double() - offset
    assert_close(codes.mean(0).float(), z.mean(0), rtol=0, atol=0.03)
    assert_close(codes.T.cov().float(), z.T.cov(), rtol=0, atol=0.05)
    folded = quantizer.eval().fold()
    assert torch.equal(folded(z + offset).z_q, quantizer(z + offset).z_q)
