"""Estimators: the value is the code to the bit, the gradient the formula of each paper."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from simvq_moe.core.gradient import (
    ESTIMATORS,
    MAX_GAIN,
    Gradient,
    noise_substitution,
    rotation,
    straight_through,
)


def jacobian(estimate: object, z: Tensor, e: Tensor) -> Tensor:
    assert callable(estimate)
    found = torch.autograd.functional.jacobian(lambda x: estimate(x, e), z)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("gradient", [one for one in ESTIMATORS if one != "noise_substitution"])
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([0.0, 1e-30, 1e-8, 1.0, 1e8]))
def test_the_value_is_the_code_to_the_bit(gradient: Gradient, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(6, 5, generator=generator) * scale
    e = torch.randn(6, 5, generator=generator)
    assert torch.equal(ESTIMATORS[gradient](z.requires_grad_(), e), e)


def test_straight_through_copies_the_gradient() -> None:
    z, e = torch.randn(2, 4).double()
    assert_close(jacobian(straight_through, z, e), torch.eye(4).double())


def test_rotation_is_the_scaled_householder_formula() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        z, e = torch.randn(2, 6).double()
        z_hat, e_hat = z / z.norm(), e / e.norm()
        r = (z_hat + e_hat) / (z_hat + e_hat).norm()
        R = torch.eye(6).double() - 2 * torch.outer(r, r) + 2 * torch.outer(e_hat, z_hat)
        gain = e.norm() / z.norm()
        assert_close(R @ z * gain, e)
        assert_close(R @ R.T, torch.eye(6).double())
        assert_close(jacobian(rotation, z, e), R * gain)


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-25, 1e-18, 1e-13, 1e-9, 1e-3])
@pytest.mark.parametrize("direction", ["random", "along", "away"])
def test_rotation_is_bounded_and_never_a_reflection_at_small_or_opposite_latents(
    scale: float, direction: str
) -> None:
    torch.manual_seed(0)
    e = torch.randn(5)
    z = {"random": torch.randn(5), "along": e.clone(), "away": -e}[direction] * scale
    J = jacobian(rotation, z, e).double()
    assert torch.linalg.matrix_norm(J, 2) <= MAX_GAIN * (1 + 1e-5)
    # a rotation times a positive gain: the determinant is the gain to the fifth power
    gain = min(float(e.norm() / z.norm()), MAX_GAIN) if z.norm() > 0 else MAX_GAIN
    assert float(torch.linalg.det(J)) == pytest.approx(gain**5, rel=1e-3)


def test_rotation_of_a_latent_exactly_opposite_keeps_the_gradient_of_the_identity() -> None:
    z = torch.randn(4).double()
    assert_close(jacobian(rotation, z, -z), torch.eye(4).double())


def test_rotation_onto_a_code_at_the_origin_passes_no_gradient() -> None:
    z = torch.randn(4).double()
    assert_close(jacobian(rotation, z, torch.zeros(4).double()), torch.zeros(4, 4).double())


def test_noise_as_long_as_the_error_stands_for_it_as_in_the_authors_code() -> None:
    z, e = torch.randn(2, 7, 5).double()
    z[0] = e[0]  # no error, no noise, and no gradient that is not finite
    z, e = z.requires_grad_(), e.requires_grad_()
    torch.manual_seed(3)
    value = noise_substitution(z, e)
    # MHVali/Noise-Substitution-in-Vector-Quantization, NSVQ.py, without its eps
    torch.manual_seed(3)
    v = torch.randn_like(z)
    residual = (z - e).square().sum(1, keepdim=True).sqrt()
    expected = z + residual / v.square().sum(1, keepdim=True).sqrt() * v
    assert_close(value, expected)
    assert_close((value - z).norm(dim=1), (e - z).norm(dim=1))
    found = torch.autograd.grad(value.sin().sum(), (z, e), retain_graph=True)
    theirs = torch.autograd.grad(expected.sin().sum(), (z, e))
    for ours, other in zip(found, theirs, strict=True):
        assert_close(ours[1:], other[1:])  # where the error is 0 theirs is not finite
    assert bool(torch.autograd.grad(value.sum(), z)[0].isfinite().all())
