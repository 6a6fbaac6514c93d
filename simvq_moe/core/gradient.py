"""Gradients through the choice of a code: the forward value is the code, exactly.

Straight-through (Bengio et al., arXiv:1308.3432) copies the gradient of the code to the latent;
the rotation trick (Fifty et al., arXiv:2410.06424, section 4.2) turns it by the rotation that
carries the latent onto the code and scales it by the ratio of their lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Gradient = Literal["straight_through", "rotation"]

MAX_GAIN = 10.0
"""Largest |e| / |z| that the rotation trick passes on: without a bound it explodes at z = 0."""


def straight_through(
    z: Float[Tensor, "*batch width"], e: Float[Tensor, "*batch width"]
) -> Float[Tensor, "*batch width"]:
    """Value e, gradient of the identity in z. `z - z.detach()` is 0, so e is met to the bit."""
    return e.detach() + (z - z.detach())


def rotation(
    z: Float[Tensor, "*batch width"], e: Float[Tensor, "*batch width"]
) -> Float[Tensor, "*batch width"]:
    """Value e, gradient of lambda R z: R rotates z onto e and lambda = |e| / |z|, both constant.

    R z = z - 2 (z · r) r + 2 (z · z^) e^ with r = (z^ + e^) / |z^ + e^|. Where z is 0 or points
    exactly away from e no such rotation is defined and R is the identity; lambda is at most
    `MAX_GAIN`.
    """
    with torch.no_grad():
        z_hat, e_hat = F.normalize(z, dim=-1), F.normalize(e, dim=-1)
        r = F.normalize(z_hat + e_hat, dim=-1)
        length = z.norm(dim=-1, keepdim=True)
        floor = torch.finfo(z.dtype).tiny
        gain = (e.norm(dim=-1, keepdim=True) / length.clamp_min(floor)).clamp_max(MAX_GAIN)
        defined = (z_hat + e_hat).norm(dim=-1, keepdim=True) > 1e-3
        defined &= (length > floor) & (e.norm(dim=-1, keepdim=True) > floor)
    along_r = (z * r).sum(-1, keepdim=True)
    along_z = (z * z_hat).sum(-1, keepdim=True)
    turned = torch.where(defined, z - 2 * along_r * r + 2 * along_z * e_hat, z)
    return straight_through(gain * turned, e)


ESTIMATORS: dict[Gradient, Callable[[Tensor, Tensor], Tensor]] = {
    "straight_through": straight_through,
    "rotation": rotation,
}
