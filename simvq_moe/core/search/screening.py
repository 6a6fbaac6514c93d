"""Groups of codes that can still hold the nearest code, from one bfloat16 product.

With latents a = z - c and codes b = e - c centred on the mean latent c, the scores
a · b - |b|^2 / 2 of one token differ from the float32 ones, z · e - |e|^2 / 2, by a constant and by
rounding. A group is ruled out only if the sum of both rounding errors, bounded as for any inner
product (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), cannot lift its
largest score to that of the best group. So the ids found among the rest are those of the float32
search, always. Row-wise maxima without an index are cheap; that is why groups are screened.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

GROUP = 256
"""Codes that are ruled out together."""

SCREEN_FROM_TOKENS = 256
SCREEN_FROM_CODES = 4096
"""A smaller search costs less in one float32 pass than in two."""

TOKEN_TILE, CODE_TILE = 512, 2048
"""Sizes of a product: its scores stay in the cache until their maxima are taken."""

U = 2.0**-8
"""Unit roundoff of bfloat16."""
V = 2.0**-24
"""Unit roundoff of float32."""
TINY = torch.finfo(torch.float32).tiny
"""Smaller numbers may be flushed to zero."""


@runtime_checkable
class TiledCodes(Protocol):
    """Codes that come in tiles of any number of rows; only the last may be shorter."""

    def __len__(self) -> int: ...
    def tiles(self, size: int) -> Iterator[tuple[int, Float[Tensor, "rows width"]]]: ...
    def half_norms(self, rows: Float[Tensor, "rows width"]) -> Float[Tensor, " rows"]: ...


def is_worth_screening(z: Float[Tensor, "tokens width"], codes: int) -> bool:
    """True where the processor multiplies bfloat16 much faster and the search is large enough."""
    if z.dtype != torch.float32 or z.is_cuda or codes < SCREEN_FROM_CODES:
        return False
    return len(z) >= SCREEN_FROM_TOKENS and _has_fast_bfloat16()


def _has_fast_bfloat16() -> bool:
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def groups_that_may_win(
    z: Float[Tensor, "tokens width"], codes: TiledCodes
) -> Bool[Tensor, "groups tokens"]:
    """True where a group of `GROUP` codes may hold the token's nearest code in float32."""
    centre = z.mean(0)
    a16 = (z - centre).bfloat16()
    # (a, -1, -1) · (b, high, low) = a · b - |b|^2 / 2: the half norm in two parts, one rounding
    factors = [
        torch.cat([part, part.new_full((len(part), 2), -1)], 1).T.contiguous()
        for part in a16.split(TOKEN_TILE)
    ]
    groups = -(-len(codes) // GROUP)
    top = torch.empty(groups, len(z), dtype=torch.bfloat16)
    length, error = z.new_empty(groups), z.new_empty(groups)
    # one buffer for all products: memory that was never touched costs as much as the writing
    buffer = top.new_empty((CODE_TILE + GROUP) * TOKEN_TILE)
    for start, tile in codes.tiles(CODE_TILE):
        b = _whole_groups(tile) - centre
        half, b16 = codes.half_norms(b), b.bfloat16()
        high = half.bfloat16()
        here = slice(start // GROUP, (start + len(b)) // GROUP)
        length[here] = _group_max((2 * half).sqrt())
        error[here] = _group_max((b - b16).norm(dim=1))
        tile16 = torch.cat([b16, high[:, None], (half - high).bfloat16()[:, None]], 1)
        for first, part in zip(range(0, len(z), TOKEN_TILE), factors, strict=True):
            shape = (len(b), part.shape[1])
            score = buffer[: prod(shape)].view(shape)
            torch.mm(tile16, part, out=score)
            top[here, first : first + TOKEN_TILE] = _group_max(score)
    keep = torch.empty(groups, len(z), dtype=torch.bool)
    for first in range(0, len(z), TOKEN_TILE):
        rows = slice(first, first + TOKEN_TILE)
        score = top[:, rows].float()
        slack = _rounding_bound(score, z[rows], a16[rows], centre, length, error)
        # NaN compares false: a token whose bound overflows keeps every group
        keep[:, rows] = ~(score + slack < (score - slack).amax(0))
    return keep


def _whole_groups(tile: Float[Tensor, "rows width"]) -> Float[Tensor, "more width"]:
    """The last code repeated until groups are full, which changes no maximum."""
    missing = -len(tile) % GROUP
    return torch.cat([tile, tile[-1:].expand(missing, -1)]) if missing else tile


def _group_max(scores: Float[Tensor, "codes ..."]) -> Float[Tensor, "groups ..."]:
    # down the columns, which vectorizes over tokens: twice as fast as along rows
    return scores.unflatten(0, (-1, GROUP)).amax(1)


def _rounding_bound(
    score: Float[Tensor, "groups tokens"],
    z: Float[Tensor, "tokens width"],
    a16: Float[Tensor, "tokens width"],
    centre: Float[Tensor, " width"],
    length: Float[Tensor, " groups"],
    error: Float[Tensor, " groups"],
) -> Float[Tensor, "groups tokens"]:
    """Bound on the errors of a bfloat16 and of a float32 score together, up to the constant.

    `length` bounds |b| in each group and `error` |b - bfloat16(b)|. The terms, in order: both
    factors rounded to bfloat16 (Cauchy-Schwarz), the lower part of the half norm, the largest
    score rounded once (rounding keeps the order, so only its own error counts), float32 sums of
    `width` terms and the centring in either pass, and underflow. All but the third are products of
    a number of the group and one of the token, so that one small matrix product adds them up.
    """
    width, b, e = z.shape[1], length, length + centre.norm()
    a = z - centre
    lengths, plain = a.norm(dim=1), z.norm(dim=1)
    sums, least = (2 * width + 16) * V, 4 * width * TINY
    own = U * U * b * b / 2 + sums * (b * b + e * e) / 2 + least * (1 + b)
    of_groups = torch.stack([b, error, sums * e, torch.full_like(b, least), own], 1)
    of_tokens = torch.stack(
        [
            (a - a16).norm(dim=1) + sums * lengths,
            a16.float().norm(dim=1),
            plain,
            lengths,
            torch.ones_like(plain),
        ]
    )
    # 1 % covers the rounding of the lengths and of this bound itself
    return (of_groups @ of_tokens).add_(score.abs(), alpha=U).mul_(1.01)
