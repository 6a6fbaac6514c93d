"""Exact nearest-code search without a tokens x codes matrix.

argmin_i |z - e_i|^2 = argmax_i s_i with s_i = z · e_i - |e_i|^2 / 2. Codes e = base @ W + bias are
formed tile by tile and thrown away, tiles outermost, so memory is O(tokens + tile). On GPUs one
kernel scores a tile and keeps the best (`nearest_triton`). Where bfloat16 products are fast,
`screening` on processors and `screening_triton` on GPUs first rule out the groups of codes that
cannot win.

s_i is rounded by about |z| |e_i| and not by the distance, so far from the origin most ids would be
wrong: at 1,000 times the spread 3 of 4 in float32. Distances don't change when z and e are moved
together, so there the origin is moved to where the codes are (`centring`) before anything is
scored; the difference of close numbers is exact (Sterbenz). Where the origin is near, nothing is
moved, and every bit stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.core.precision import full_precision
from simvq_moe.core.search.centring import SAMPLE, best_centre, far_centre, spread_sample
from simvq_moe.core.search.faster_way import FasterWay
from simvq_moe.core.search.screening import GROUP, groups_that_may_win, is_worth_screening

TOKEN_TILE = 1024
"""Tokens that meet a tile of codes at once: their scores stay in the processor's cache."""

TOKEN_BLOCK, CODE_TILE = 4096, 1024
"""Tokens searched together, for which each tile of codes is formed once, and codes of a tile."""

GPU_BLOCK, GPU_TILE = 16384, 16384
"""The same on GPUs, which need more work at once."""

TENSOR_CORES = (8, 0)
"""The capability from which a GPU has products of bfloat16."""

_faster = FasterWay()


class NotFiniteError(ValueError):
    """Numbers to choose by are NaN or infinite: no code is nearest, no next token is likely."""


@torch.no_grad()
def nearest(
    z: Float[Tensor, "tokens width"],
    base: Float[Tensor, "codes base_width"],
    *,
    W: Tensor | None = None,
    bias: Float[Tensor, "... width"] | None = None,
) -> Int[Tensor, " tokens"]:
    """Id of the code nearest to each z in Euclidean distance; ties go to the lowest id.

    Args:
        z: the latents; their dtype, float32 or float64, is that of the search.
        base: the codes, or the rows that W and bias turn into codes.
        W: (base_width, width), or (width,) for a diagonal map, or (groups, base_width, width) for
            one map each of as many equal blocks of codes; None: the identity.
        bias: added to every mapped row; (groups, width) for separate maps.

    Raises:
        NotFiniteError: z or codes hold NaN or infinite values, for which no code is nearest.
    """
    if torch.compiler.is_exporting():
        codes = Codes(base, W, bias, z.dtype).rows(0, len(base))
        centre = far_centre(spread_sample(codes))
        z, codes = z - centre, codes - centre
        return torch.addmm(codes.square().sum(1) / 2, z, codes.T, beta=-1).argmax(1)
    return _nearest(*(t if t is None else t.detach() for t in (z, base, W, bias)))


# an operator of its own, because its control flow depends on data: opaque to torch.compile
@torch.library.custom_op(
    "simvq_moe::nearest",
    mutates_args=(),
    schema="(Tensor z, Tensor base, Tensor? W, Tensor? bias) -> Tensor",
)
def _nearest(z: Tensor, base: Tensor, W: Tensor | None, bias: Tensor | None) -> Tensor:
    codes = Codes(base, W, bias, z.dtype)
    ids = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    best = torch.full((len(z),), -torch.inf, dtype=z.dtype, device=z.device)
    with full_precision():
        z = codes.centred(z)
        for first in range(0, len(z), codes.block):
            block = slice(first, first + codes.block)
            _search(z[block], codes, ids[block], best[block])
    _check_finite(z, best, codes)
    return ids


def _check_finite(z: Tensor, best: Tensor, codes: Codes) -> None:
    if not bool(best.isfinite().all() & codes.finite):
        bad = int((~z.isfinite()).any(1).sum())
        whose = f"{bad} of {len(z)} latents are" if bad else "the codebook is"
        raise NotFiniteError(
            f"nearest: {whose} not finite, so no code is nearest: lower the learning rate or clip"
        )


def flops_of_search(
    z: Sequence[int], base: Sequence[int], W: Sequence[int] | None, *_: Any, **__: Any
) -> int:
    """Floating-point operations of the matrix products of a search, whichever way it takes: a score
    of every token and code, and the codes under a map, once.

    Args:
        z, base, W: shapes of the arguments of `nearest`.
    """
    width = z[-1]
    mapped = 0 if W is None or len(W) == 1 else base[0] * base[1] * width
    return 2 * (z[0] * base[0] * width + mapped)


@_nearest.register_fake
def _(z: Tensor, base: Tensor, W: Tensor | None, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return z.new_empty(len(z), dtype=torch.int64)


@torch.no_grad()
def nearest_few(
    z: Float[Tensor, "tokens width"], codes: Float[Tensor, "codes width"], few: int
) -> tuple[Int[Tensor, "tokens few"], Float[Tensor, "tokens few"]]:
    """Ids of the `few` codes nearest to each z, the nearest first, and their squared distances.

    The distances are those of differences, so that they are exact at a code. Of equally near codes
    the lowest id is first, but which of them are last is left open.
    Memory is O(tokens few + tile).

    Raises:
        ValueError: there are fewer codes than that.
        NotFiniteError: z or codes hold NaN or infinite values.
    """
    if not 1 <= few <= len(codes):
        raise ValueError(f"{few} neighbours of {len(codes)} codes: ask for 1 to {len(codes)}")
    book = Codes(codes, None, None, z.dtype)
    ids = torch.zeros(len(z), few, dtype=torch.int64, device=z.device)
    best = torch.full((len(z), few), -torch.inf, dtype=z.dtype, device=z.device)
    with full_precision():
        moved = book.centred(z)
        for start, tile in book.tiles(book.tile):
            half_norms = book.half_norms(tile)
            for first in range(0, len(z), TOKEN_TILE):
                rows = slice(first, first + TOKEN_TILE)
                score = torch.addmm(half_norms, moved[rows], tile.T, beta=-1)
                value, local = score.topk(min(few, len(tile)))
                best[rows], kept = torch.cat([best[rows], value], 1).topk(few)
                ids[rows] = torch.cat([ids[rows], local + start], 1).gather(1, kept)
    _check_finite(z, best, book)
    square = torch.empty_like(best)
    for first in range(0, len(z), TOKEN_TILE):
        rows = slice(first, first + TOKEN_TILE)
        square[rows] = (z[rows, None] - book.base[ids[rows]].to(z.dtype)).square().sum(-1)
    order = ids.argsort(dim=1)
    order = order.gather(1, square.gather(1, order).argsort(dim=1, stable=True))
    return ids.gather(1, order), square.gather(1, order)


def numbered(
    ids: Int[Tensor, " tokens"], z: Float[Tensor, "tokens width"]
) -> Int[Tensor, " tokens"]:
    """The ids that a rule other than the distance gave z.

    Raises:
        NotFiniteError: z holds NaN or infinite values, which have no place among any codes.
    """
    return ids if torch.compiler.is_exporting() else _numbered(ids, z.detach())


@torch.library.custom_op(
    "simvq_moe::numbered", mutates_args=(), schema="(Tensor ids, Tensor z) -> Tensor"
)
def _numbered(ids: Tensor, z: Tensor) -> Tensor:
    bad = int((~z.isfinite()).any(1).sum())
    if bad:
        raise NotFiniteError(
            f"{bad} of {len(z)} latents are not finite: lower the learning rate or clip"
        )
    return ids.clone()


@_numbered.register_fake
def _(ids: Tensor, z: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(ids)


class Codes:
    """The rows base @ W + bias - centre, formed on demand; notes whether they are finite."""

    def __init__(
        self, base: Tensor, W: Tensor | None, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.base, self.dtype = base, dtype
        self.W = None if W is None else W.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        # tokens and codes of a step of a search in one pass
        gpu = base.is_cuda
        self.block, self.tile = (GPU_BLOCK, GPU_TILE) if gpu else (TOKEN_BLOCK, CODE_TILE)
        self.finite = torch.ones((), dtype=torch.bool, device=base.device)
        self.centre: Tensor | None = None

    def __len__(self) -> int:
        return len(self.base)

    def centred(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        """Move the origin to where the search is well-conditioned: the latents, moved with it."""
        self.centre = best_centre(z, self)
        return z if self.centre is None else z - self.centre

    def rows(self, start: int, stop: int) -> Float[Tensor, "rows width"]:
        """The codes of these ids."""
        rows = self.base[start:stop].to(self.dtype)
        if self.W is not None and self.W.ndim == 3:
            rows = self._rows_of_groups(rows, start, self.W)
        else:
            rows = self._mapped(rows)
        return rows if self.centre is None else rows - self.centre

    def sample(self) -> Float[Tensor, "rows width"]:
        """Some codes, evenly spread."""
        if self.W is None or self.W.ndim < 3:
            return self._mapped(spread_sample(self.base).to(self.dtype))
        groups = self.base.unflatten(0, (len(self.W), -1)).transpose(0, 1)
        rows = spread_sample(groups, SAMPLE // len(self.W)).transpose(0, 1).to(self.dtype) @ self.W
        return (rows if self.bias is None else rows + self.bias[:, None]).flatten(0, 1)

    def _mapped(self, rows: Tensor) -> Tensor:
        if self.W is not None:
            rows = rows * self.W if self.W.ndim == 1 else rows @ self.W
        return rows if self.bias is None else rows + self.bias

    def _rows_of_groups(self, rows: Tensor, start: int, maps: Tensor) -> Tensor:
        size = len(self) // len(maps)
        parts: list[Tensor] = []
        while len(rows):
            group, passed = divmod(start, size)
            part = rows[: size - passed] @ maps[group]
            parts.append(part if self.bias is None else part + self.bias[group])
            rows, start = rows[len(part) :], start + len(part)
        return torch.cat(parts)

    def tiles(self, size: int) -> Iterator[tuple[int, Float[Tensor, "rows width"]]]:
        """First id and rows of each tile of that many codes."""
        for start in range(0, len(self), size):
            yield start, self.rows(start, start + size)

    def half_norms(self, rows: Float[Tensor, "rows width"]) -> Float[Tensor, " rows"]:
        """|e|^2 / 2 of each row."""
        half = rows.square().sum(1) / 2
        self.finite &= half.isfinite().all()
        return half


def _search(z: Tensor, codes: Codes, ids: Tensor, best: Tensor) -> None:
    """Write the ids and scores of a block of tokens."""
    if not is_worth_screening(z, len(codes)):
        for start, tile in codes.tiles(codes.tile):
            _improve(z, tile, codes.half_norms(tile), start, ids, best)
        return
    may_win = groups_that_may_win(z, codes)
    for start, tile in codes.tiles(codes.tile):
        half_norms = codes.half_norms(tile)
        for first in range(0, len(tile), GROUP):
            tokens = may_win[(start + first) // GROUP].nonzero().squeeze(1)
            if len(tokens):
                group = slice(first, first + GROUP)
                mine, score = ids[tokens], best[tokens]
                _improve(z[tokens], tile[group], half_norms[group], start + first, mine, score)
                ids[tokens], best[tokens] = mine, score


def _improve(
    z: Tensor, tile: Tensor, half_norms: Tensor, start: int, ids: Tensor, best: Tensor
) -> None:
    """Put a tile's best code in place of the best so far wherever it is strictly better."""
    kernel = _has_kernel(z)
    best_of, at_once = (_best_by_kernel, len(z)) if kernel else (_best, TOKEN_TILE)
    for first in range(0, len(z), at_once):
        rows = slice(first, first + at_once)
        value, local = best_of(z[rows], tile, half_norms, best[rows])
        # a NaN must win here, or it would pass as id 0
        wins = ~(value <= best[rows])
        ids[rows] = torch.where(wins, local + start, ids[rows])
        best[rows] = torch.where(wins, value, best[rows])


def _has_kernel(z: Tensor) -> bool:
    """True on GPUs with Triton, and on the CPU where its interpreter is switched on."""
    on = z.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return on and z.dtype == torch.float32 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _best_by_kernel(
    z: Tensor, tile: Tensor, half_norms: Tensor, best: Tensor
) -> tuple[Tensor, Tensor]:
    """What `_best` says, by Triton; a token that is not better off than before may get less."""
    from simvq_moe.core.search.nearest_triton import best_codes
    from simvq_moe.core.search.screening_triton import best_screened

    def one_pass() -> tuple[Tensor, Tensor]:
        return best_codes(z, tile, half_norms)

    if not _has_tensor_cores(z):
        return one_pass()
    key = (z.device, z.shape[1], len(z).bit_length(), len(tile).bit_length())
    return _faster(key, one_pass, lambda: best_screened(z, tile, half_norms, best))


def _has_tensor_cores(z: Tensor) -> bool:
    return z.is_cuda and torch.cuda.get_device_capability(z.device) >= TENSOR_CORES


def _best(z: Tensor, tile: Tensor, half_norms: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """Largest score of each token in a tile, and the first index that has it."""
    score = torch.addmm(half_norms, z, tile.T, beta=-1)
    # argmax promises the first of equals, max does not
    local = score.argmax(1, keepdim=True)
    return score.gather(1, local).squeeze(1), local.squeeze(1)
