"""Gradients through the choice of a code: the forward value is the code, exactly, but for one.

Straight-through (Bengio et al., arXiv:1308.3432) copies the gradient of the code to the latent.
The rotation trick (Fifty et al., arXiv:2410.06424, section 4.2) turns it by the rotation that
carries the latent onto the code and scales it by the ratio of their lengths. DiVeQ
(arXiv:2509.26469) keeps the length of the error differentiable and its direction fixed, so that
the task's own loss trains latents and codes alike. Noise substitution (NSVQ, Vali and Baeckstroem,
IEEE Access 10, 2022) puts noise as long as the error in its place, while it trains: that value is
differentiable as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Gradient = Literal["straight_through", "rotation", "diveq", "noise_substitution"]

MAX_GAIN = 10.0
"""Largest |e| / |z| that the rotation trick passes on: without a bound it explodes at z = 0."""

SHORTEST = 1e-12
"""Vectors shorter than this have no direction: their squares lose bits or vanish in float32."""

DIVEQ_NOISE = 1e-3**0.5
"""Standard deviation of the noise in DiVeQ's direction (sigma^2 = 1e-3 in the paper)."""


def straight_through(
    z: Float[Tensor, "*batch width"], e: Float[Tensor, "*batch width"]
) -> Float[Tensor, "*batch width"]:
    """Value e, gradient of the identity in z."""
    return _with_value_of(e, z)


def rotation(
    z: Float[Tensor, "*batch width"], e: Float[Tensor, "*batch width"]
) -> Float[Tensor, "*batch width"]:
    """Value e, gradient of lambda R z: R rotates z onto e and lambda = |e| / |z|, both constant.

    R z = z - 2 (z · r) r + 2 (z · z^) e^ with r = (z^ + e^) / |z^ + e^|. Where z or e is 0 or z
    points exactly away from e no such rotation is defined and R is the identity; lambda is at
    most `MAX_GAIN`.
    """
    with torch.no_grad():
        z_hat, z_length = _direction(z)
        e_hat, e_length = _direction(e)
        r, opening = _direction(z_hat + e_hat)
        defined = (z_length > SHORTEST) & (e_length > SHORTEST) & (opening > 1e-3)
        gain = (e_length / z_length.clamp_min(SHORTEST)).clamp_max(MAX_GAIN)
    along_r = (z * r).sum(-1, keepdim=True)
    along_z = (z * z_hat).sum(-1, keepdim=True)
    turned = torch.where(defined, z - 2 * along_r * r + 2 * along_z * e_hat, z)
    return _with_value_of(e, gain * turned)


def diveq(
    z: Float[Tensor, "*batch width"], e: Float[Tensor, "*batch width"], *, noisy: bool = True
) -> Float[Tensor, "*batch width"]:
    """Value e, gradient of z + |e - z| v^ in z and e: v^ is the constant, noisy direction of e - z.

    The paper also lets the noise into the value; here the value stays the code, so that training
    sees what `decode` returns.
    """
    error = e - z
    with torch.no_grad():
        noise = DIVEQ_NOISE * torch.randn_like(error) if noisy else 0
        v_hat, _ = _direction(error + noise)
    return _with_value_of(e, z + error.norm(dim=-1, keepdim=True) * v_hat)


def noise_substitution(
    z: Float[Tensor, "*batch width"], e: Float[Tensor, "*batch width"]
) -> Float[Tensor, "*batch width"]:
    """z + |e - z| v^, its value and its gradient in z and e: v^ is a random direction.

    It is for training alone. The task's own loss trains codes, without a codebook loss, and drives
    the length of the error down, because all that the decoder sees of it is noise.
    """
    direction, _ = _direction(torch.randn_like(z))
    return z + (e - z).norm(dim=-1, keepdim=True) * direction


ESTIMATORS: dict[Gradient, Callable[[Tensor, Tensor], Tensor]] = {
    "straight_through": straight_through,
    "rotation": rotation,
    "diveq": diveq,
    "noise_substitution": noise_substitution,
}
IN_EVALUATION = ESTIMATORS | {
    "diveq": partial(diveq, noisy=False),
    "noise_substitution": straight_through,
}
"""The same without noise: the value is the code, and no random number is drawn."""


def _with_value_of(e: Tensor, path: Tensor) -> Tensor:
    # path - path.detach() is 0 and not "almost 0", so e is met to the bit
    return e.detach() + (path - path.detach())


def _direction(x: Tensor) -> tuple[Tensor, Tensor]:
    length = x.norm(dim=-1, keepdim=True)
    return x / length.clamp_min(SHORTEST), length
