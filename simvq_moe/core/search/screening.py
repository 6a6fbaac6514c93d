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
    top = torch.empty(groups, len(z), dtype=torch.bfloat16, device=z.device)
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
    keep = torch.empty(groups, len(z), dtype=torch.bool, device=z.device)
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

    Beyond those of the products: the half norm's two parts, and the largest score rounded once
    (rounding keeps the order, so only its own error counts).
    """
    sums, e = (2 * z.shape[1] + 16) * V, length + centre.norm()
    own = U * U * length * length / 2 + sums * (length * length + e * e) / 2
    of_tokens = terms_of_tokens(z - centre, a16, z.norm(dim=1), sums)
    bound = terms_of_groups(length, error, e, own, sums, z.shape[1]) @ of_tokens
    # 1 % covers the rounding of the lengths and of this bound itself
    return bound.add_(score.abs(), alpha=U).mul_(1.01)


def terms_of_groups(
    length: Float[Tensor, " groups"],
    error: Float[Tensor, " groups"],
    plain: Float[Tensor, " groups"],
    own: Float[Tensor, " groups"],
    sums: float,
    width: int,
) -> Float[Tensor, "groups 5"]:
    """What a group of codes b adds to the bound on the errors of its products with any a.

    The bound is the sum of these terms times those of a token: one small matrix product. In order:
    either factor rounded to bfloat16 (Cauchy-Schwarz), the sum of `width` products in the float32
    pass, underflow, and what depends on the codes alone.

    Args:
        length: the largest |b| in each group.
        error: the largest |b - bfloat16(b)|.
        plain: the largest |e|, of the codes that the float32 pass meets.
        own: the errors of half norms.
        sums: relative error of a sum of `width` products.
    """
    least = 4 * width * TINY
    alone = own + least * (1 + length)
    return torch.stack([length, error, sums * plain, torch.full_like(length, least), alone], 1)


def terms_of_tokens(
    a: Float[Tensor, "tokens width"],
    a16: Float[Tensor, "tokens width"],
    plain: Float[Tensor, " tokens"],
    sums: float,
) -> Float[Tensor, "5 tokens"]:
    """What latents a, and a16 as rounded to bfloat16, are multiplied with in the bound on errors;
    `plain` are the lengths of those that the float32 pass meets."""
    lengths = a.norm(dim=1)
    rounded = (a - a16).norm(dim=1) + sums * lengths
    return torch.stack([rounded, a16.float().norm(dim=1), plain, lengths, torch.ones_like(plain)])
