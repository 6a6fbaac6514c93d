"""Exact nearest-code search without a tokens x codes matrix, in one pass or two.

argmin_i |z - e_i|^2 = argmax_i s_i with s_i = z · e_i - |e_i|^2 / 2. Codes e = base @ W + bias are
formed tile by tile and thrown away, tiles outermost, so memory is O(tokens + tile).

Where bfloat16 products are fast a first pass finds the largest s of each tile from one bfloat16
product, and only tiles that its rounding error cannot rule out are searched in float32. The error
bound is that of inner products (Higham, Accuracy and Stability of Numerical Algorithms, section
3.1), so the ids are those of the float32 search always, not only with luck.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TOKEN_TILE = 1024
"""Tokens that meet a tile of codes at once: their scores stay in the processor's cache."""

TOKEN_BLOCK = 4096
"""Tokens searched together: each tile of codes is formed once for all of them."""

SCREEN_FROM_TOKENS = 256
SCREEN_FROM_TILES = 4
"""A smaller search costs less in one float32 pass than in two."""


@torch.no_grad()
def nearest(
    z: Float[Tensor, "tokens width"],
    base: Float[Tensor, "codes base_width"],
    *,
    W: Tensor | None = None,
    bias: Float[Tensor, " width"] | None = None,
) -> Int[Tensor, " tokens"]:
    """Id of the code nearest to each z in Euclidean distance; ties go to the lowest id.

    Args:
        z: the latents; their dtype, float32 or float64, is that of the search.
        base: the codes, or the rows that W and bias turn into codes.
        W: (base_width, width), or (width,) for a diagonal map; None: the identity.
        bias: added to every mapped row.

    Raises:
        ValueError: z or codes hold NaN or infinite values, for which no code is nearest.
    """
    if torch.compiler.is_exporting():
        codes = _Codes(base, W, bias, z.dtype).rows(0, len(base))
        return torch.addmm(codes.square().sum(1) / 2, z, codes.T, beta=-1).argmax(1)
    return _nearest(*(t if t is None else t.detach() for t in (z, base, W, bias)))


# an operator of its own, because its control flow depends on data: opaque to torch.compile
@torch.library.custom_op("simvq_moe::nearest", mutates_args=())
def _nearest(z: Tensor, base: Tensor, W: Tensor | None, bias: Tensor | None) -> Tensor:
    codes = _Codes(base, W, bias, z.dtype)
    ids = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    best = torch.full((len(z),), -torch.inf, dtype=z.dtype, device=z.device)
    with _full_precision():
        for first in range(0, len(z), TOKEN_BLOCK):
            block = slice(first, first + TOKEN_BLOCK)
            _search(z[block], codes, ids[block], best[block])
    found = best.isfinite() & codes.finite
    if not bool(found.all()):
        raise ValueError(
            f"nearest: {int((~found).sum())} of {len(z)} tokens have no nearest code, because "
            "the latents or the codebook are not finite: lower the learning rate or clip"
        )
    return ids


@_nearest.register_fake
def _(z: Tensor, base: Tensor, W: Tensor | None, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return z.new_empty(len(z), dtype=torch.int64)


class _Codes:
    """Tiles of base @ W + bias, formed on demand; notes whether all of them are finite."""

    def __init__(
        self, base: Tensor, W: Tensor | None, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.base, self.dtype = base, dtype
        self.W = None if W is None else W.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.tile = 8192 if base.is_cuda else 1024
        self.starts = range(0, len(base), self.tile)
        self.finite = torch.ones((), dtype=torch.bool, device=base.device)

    def rows(self, start: int, stop: int) -> Tensor:
        rows = self.base[start:stop].to(self.dtype)
        if self.W is not None:
            rows = rows * self.W if self.W.ndim == 1 else rows @ self.W
        return rows if self.bias is None else rows + self.bias

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """First id and rows of each tile."""
        for start in self.starts:
            yield start, self.rows(start, start + self.tile)

    def half_norms(self, tile: Tensor) -> Tensor:
        half = tile.square().sum(1) / 2
        self.finite &= half.isfinite().all()
        return half


def _search(z: Tensor, codes: _Codes, ids: Tensor, best: Tensor) -> None:
    """Write the ids and scores of a block of tokens."""
    keep = _screen(z, codes) if _is_worth_screening(z, codes) else None
    for number, start in enumerate(codes.starts):
        rows = None
        if keep is not None:
            rows = keep[:, number].nonzero().squeeze(1)
            if len(rows) == 0:
                continue
        tile = codes.rows(start, start + codes.tile)
        if rows is None or 2 * len(rows) > len(z):
            _improve(z, tile, codes.half_norms(tile), start, ids, best)
        else:
            some_ids, some_best = ids[rows], best[rows]
            _improve(z[rows], tile, codes.half_norms(tile), start, some_ids, some_best)
            ids[rows], best[rows] = some_ids, some_best


def _improve(
    z: Tensor, tile: Tensor, half_norms: Tensor, start: int, ids: Tensor, best: Tensor
) -> None:
    """Put a tile's best code in place of the best so far wherever it is strictly better."""
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


def _is_worth_screening(z: Tensor, codes: _Codes) -> bool:
    if z.dtype != torch.float32 or z.is_cuda or not _has_fast_bfloat16():
        return False
    return len(z) >= SCREEN_FROM_TOKENS and len(codes.starts) >= SCREEN_FROM_TILES


def _has_fast_bfloat16() -> bool:
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _screen(z: Tensor, codes: _Codes) -> Bool[Tensor, "tokens tiles"]:
    """True where a tile may hold the token's nearest code in float32.

    Latents and codes are centred on the mean latent first, which shifts all scores of a token
    alike and makes the bound tight for data far from the origin.
    """
    centre = z.mean(0)
    a = z - centre
    a16 = a.bfloat16()
    top = z.new_empty(len(z), len(codes.starts))
    longest = z.new_empty(len(codes.starts))
    for number, (_, tile) in enumerate(codes):
        b = tile - centre
        half_norms = codes.half_norms(b)
        longest[number] = (2 * half_norms.max()).sqrt()
        half16, b16 = half_norms.bfloat16(), b.bfloat16().T
        for first in range(0, len(z), TOKEN_TILE):
            rows = slice(first, first + TOKEN_TILE)
            top[rows, number] = torch.addmm(half16, a16[rows], b16, beta=-1).amax(1).float()
    error = _rounding_bound(
        a.norm(dim=1, keepdim=True),
        longest,
        z.norm(dim=1, keepdim=True),
        longest + centre.norm(),
        z.shape[1],
    )
    # NaN compares false: a token whose bound overflows keeps every tile
    return ~(top + error < (top - error).amax(1, keepdim=True))


def _rounding_bound(
    a: Tensor, b: Tensor, z: Tensor, e: Tensor, width: int
) -> Float[Tensor, "tokens tiles"]:
    """Bound on |bfloat16 score - float32 score|, from the lengths of latents and codes.

    a and b are the lengths of the centred latent and the longest centred code, z and e those of
    the plain ones. With u = 2^-8 and v = 2^-24, the units of rounding: both factors to bfloat16
    2u + u^2, the product and the difference to bfloat16 u each, the half norm u twice; float32 sums
    of `width` terms and the centring at most (2 width + 16) v, in either pass. Numbers below the
    smallest normal one may be flushed to 0.
    """
    u, v, tiny = 2.0**-8, 2.0**-24, torch.finfo(torch.float32).tiny
    bfloat16 = (1 + 4 * u) * (4 * u * a * b + u * b * b)
    float32 = (2 * width + 16) * v * (a * b + b * b / 2 + z * e + e * e / 2)
    # 1 % covers the rounding of the lengths and of this bound itself
    return 1.01 * (bfloat16 + float32 + 4 * width * tiny * (1 + a + b))


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32, whatever the caller allows elsewhere (TF32, bfloat16)."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
