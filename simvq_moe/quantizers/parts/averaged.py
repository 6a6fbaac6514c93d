"""A codebook that follows the latents step by step, and has no gradient."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.quantizers.codebook import Quantizer, mean_squared_error


class AveragedCodebook(Quantizer):
    """Codes are rows of the state `codes_now`, which `update` sets; the commitment loss is all that
    latents learn by."""

    codes_now: Tensor

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        return self.codes_now.to(dtype or self.codes_now.dtype)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        return self.codes_now[ids].to(dtype or self.codes_now.dtype)

    def losses(
        self, z: Float[Tensor, "tokens width"], e: Float[Tensor, "tokens width"]
    ) -> dict[str, Tensor]:
        return {"commitment": mean_squared_error(z, e.detach())}

    @property
    def changes_by_steps(self) -> bool:
        return True
