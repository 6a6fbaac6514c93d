"""Exact nearest-code search without a tokens x codes matrix.

argmin_i |z - e_i|^2 = argmax_i (z · e_i - |e_i|^2 / 2): one matrix product a tile of codes, with
the best so far kept for each token. Memory is O(tokens + tile).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

CODE_TILE = 1024
TOKEN_TILE = 4096


@torch.no_grad()
def nearest(
    z: Float[Tensor, "tokens width"], codes: Float[Tensor, "codes width"]
) -> Int[Tensor, " tokens"]:
    """Id of the code nearest to each z in Euclidean distance; ties go to the lowest id.

    Raises:
        ValueError: z or codes hold NaN or infinite values, for which no code is nearest.
    """
    ids = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    best = torch.full((len(z),), -torch.inf, dtype=z.dtype, device=z.device)
    for start in range(0, len(codes), CODE_TILE):
        tile = codes[start : start + CODE_TILE]
        half_norms = tile.square().sum(1) / 2
        for first in range(0, len(z), TOKEN_TILE):
            rows = slice(first, first + TOKEN_TILE)
            score = torch.addmm(half_norms, z[rows], tile.T, beta=-1)
            # argmax promises the first of equals, max does not
            local = score.argmax(1, keepdim=True)
            value = score.gather(1, local).squeeze(1)
            # a NaN must win here, or it would pass as id 0
            wins = ~(value <= best[rows])
            ids[rows] = torch.where(wins, local.squeeze(1) + start, ids[rows])
            best[rows] = torch.where(wins, value, best[rows])
    if not bool(best.isfinite().all()):
        raise ValueError(
            f"nearest: {int((~best.isfinite()).sum())} of {len(z)} tokens have no nearest code, "
            "because the latents or the codebook are not finite: lower the learning rate or clip"
        )
    return ids
