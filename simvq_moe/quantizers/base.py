"""What every quantizer shares: nearest-code assignment, its gradient, the two VQ losses, usage.

The objective is VQ-VAE's (arXiv:1711.00937, eq. 3) with SimVQ's names (arXiv:2411.02038, eq. 4):
loss = beta |e - sg z|^2 + gamma |z - sg e|^2, each term a mean over elements, beta =
`codebook_weight`, gamma = `commitment_weight`; the output is z + sg(e - z).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.core.gradient import ESTIMATORS, Gradient
from simvq_moe.core.nearest import nearest
from simvq_moe.core.usage import UsageCounter


class Quantized(NamedTuple):
    """What a quantizer returns."""

    z_q: Tensor
    """Quantized latents, shape and dtype of z; their value is the code, their gradient z's."""
    ids: Tensor
    """int64 ids of the codes, the leading shape of z."""
    loss: Tensor
    """Weighted sum of `losses`."""
    losses: dict[str, Tensor]
    """Each term by name, unweighted: mean squared error over elements."""


class Quantizer(nn.Module):
    """A codebook of `codes` rows of `width` channels, searched for the nearest row.

    Subclasses give `codebook` and `decode`; `losses` and `after_assignment` are theirs to change.
    Everything is computed in float32 at least, also under autocast, and in float64 if z is.
    """

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        gradient: Gradient = "straight_through",
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
    ) -> None:
        super().__init__()
        if codes < 2:
            raise ValueError(f"codes {codes} < 2: a codebook needs at least two codes")
        self.codes = codes
        self.width = width
        self.estimator = ESTIMATORS[gradient]
        self.weights = {"codebook": codebook_weight, "commitment": commitment_weight}
        self.usage = UsageCounter(codes, kind="codes")

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        """Every code, computed in `dtype` (None: as stored)."""
        raise NotImplementedError

    def decode(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        """The codes named by ids, equal to the forward value of `z_q`, computed in `dtype`."""
        raise NotImplementedError

    def encode(self, z: Float[Tensor, "*batch width"]) -> Int[Tensor, "*batch"]:
        """Ids of the nearest codes; ties go to the lowest id."""
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            flat = z.reshape(-1, self.width).to(_precise(z.dtype))
            return nearest(flat, self.codebook(flat.dtype)).view(z.shape[:-1])

    def forward(self, z: Float[Tensor, "*batch width"]) -> Quantized:
        ids = self.encode(z)
        self.usage.add(ids)
        with torch.autocast(z.device.type, enabled=False):
            latents = z.to(_precise(z.dtype))
            e = self.decode(ids, latents.dtype)
            losses = self.losses(latents, e)
            loss = torch.stack([self.weights[name] * term for name, term in losses.items()]).sum()
            z_q = self.estimator(latents, e).to(z.dtype)
        self.after_assignment(latents, ids)
        return Quantized(z_q, ids, loss, losses)

    def losses(
        self, z: Float[Tensor, "*batch width"], e: Float[Tensor, "*batch width"]
    ) -> dict[str, Tensor]:
        """The terms of the loss by name, unweighted."""
        return {
            "codebook": F.mse_loss(e, z.detach()),
            "commitment": F.mse_loss(z, e.detach()),
        }

    def after_assignment(
        self, z: Float[Tensor, "*batch width"], ids: Int[Tensor, "*batch"]
    ) -> None:
        """Called with the latents and their ids at the end of a forward pass."""

    def extra_repr(self) -> str:
        return f"codes={self.codes}, width={self.width}"


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def random_codebook(codes: int, width: int) -> Float[Tensor, "codes width"]:
    """Rows from N(0, 1/width), so that a row has length about 1 (SimVQ, section 4.3)."""
    return torch.randn(codes, width) / width**0.5
