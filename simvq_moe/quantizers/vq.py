"""The classic vector quantizers: a codebook learned by gradient (VQ-VAE, arXiv:1711.00937) or by
exponential moving averages (its appendix A.1; restart and smoothing as in arXiv:1906.00446)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.core.bank import Bank
from simvq_moe.quantizers.base import Quantizer, random_codebook


class VQ(Quantizer):
    """A codebook of free rows: a code moves only when it is selected.

    Args:
        codes: number of codes.
        width: channels of a code; rows start from N(0, 1/width), as SimVQ's do.
        options: `gradient`, `codebook_weight` (beta), `commitment_weight` (gamma) of `Quantizer`.
    """

    def __init__(self, codes: int, width: int, **options: Any) -> None:
        super().__init__(codes, width, **options)
        self.bank = Bank(random_codebook(codes, width), transform="none")

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        return self.bank.rows(dtype)

    def decode(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        return self.bank.lookup(ids, dtype)


class EMAVQ(Quantizer):
    """A codebook of moving averages of the latents assigned to each code; it has no gradient.

    counts <- decay counts + (1 - decay) n, sums <- decay sums + (1 - decay) sum of z, code = sums /
    smoothed counts, with Laplace smoothing (counts + eps) / (total + codes eps) total. n and the
    sums are added over all ranks first. Counts start at one a code, so that a code that is never
    selected stays where it is until its count falls to `epsilon`.

    Args:
        codes: number of codes.
        width: channels of a code.
        decay: weight of the past in the averages.
        epsilon: Laplace smoothing, in draws.
        options: `gradient` and `commitment_weight` (gamma) of `Quantizer`.
    """

    sums: Tensor
    counts: Tensor
    codes_now: Tensor

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__(codes, width, **options)
        self.decay = decay
        self.epsilon = epsilon
        start = random_codebook(codes, width)
        self.register_buffer("codes_now", start)
        self.register_buffer("sums", start.clone())
        self.register_buffer("counts", torch.ones(codes))

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        return self.codes_now.to(dtype or self.codes_now.dtype)

    def decode(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        return self.codes_now[ids].to(dtype or self.codes_now.dtype)

    def losses(
        self, z: Float[Tensor, "*batch width"], e: Float[Tensor, "*batch width"]
    ) -> dict[str, Tensor]:
        return {"commitment": F.mse_loss(z, e.detach())}

    @torch.no_grad()
    def after_assignment(
        self, z: Float[Tensor, "*batch width"], ids: Int[Tensor, "*batch"]
    ) -> None:
        """Move the averages, in training."""
        if not self.training:
            return
        flat, ids = z.detach().reshape(-1, self.width).to(self.sums.dtype), ids.reshape(-1)
        sums = torch.zeros_like(self.sums).index_add_(0, ids, flat)
        counts = torch.bincount(ids, minlength=self.codes).to(self.counts.dtype)
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        self.sums.lerp_(sums, 1 - self.decay)
        self.counts.lerp_(counts, 1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + self.epsilon) / (total + self.codes * self.epsilon) * total
        self.codes_now.copy_(self.sums / smoothed[:, None])
