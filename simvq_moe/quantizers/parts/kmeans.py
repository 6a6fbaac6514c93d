"""Start a codebook from the centres of the first batch (Lloyd's rounds)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.core.collectives import copy_from_rank_0, sample, total
from simvq_moe.core.search.nearest import nearest

KMEANS_ROUNDS = 10


def assigned(
    z: Float[Tensor, "tokens width"], ids: Int[Tensor, " tokens"], codes: int
) -> tuple[Float[Tensor, "codes width"], Float[Tensor, " codes"]]:
    """Sum and number of the latents of each code, over all ranks."""
    ones = z.new_ones(len(z), 1)
    joined = z.new_zeros(codes, z.shape[1] + 1).index_add_(0, ids, torch.cat([z, ones], 1))
    joined = total(joined)
    return joined[:, :-1], joined[:, -1]


@torch.no_grad()
def kmeans(
    z: Float[Tensor, "tokens width"], start: Float[Tensor, "codes width"]
) -> Float[Tensor, "codes width"]:
    """Centres of all ranks' latents after a few of Lloyd's rounds, from random latents.

    With fewer latents than codes the last codes keep their start.
    """
    chosen = sample(z, len(start), seed=0)
    centres = torch.cat([chosen, start[len(chosen) :]])
    for _ in range(KMEANS_ROUNDS):
        sums, counts = assigned(z, nearest(z, centres), len(centres))
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
    copy_from_rank_0(centres)
    return centres
