"""The search of `nearest` as one Triton kernel: products, half norms and argmax without leaving
the chip, in IEEE float32. A tokens x codes matrix exists at no time, not even of one tile.

Each program keeps the best code of `TOKENS` tokens over one slice of the codes; slices fill the
GPU where tokens are few, and are merged in the order of their ids. Where `screening_triton` has
listed the tokens of each group of codes, a slice is a group and meets these tokens alone; a score
is summed up in the same order either way, so that it is the same to the bit.

A token or code with NaN scores -inf, as if no code were near.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

TOKENS, CODES, CHANNELS = 64, 128, 32
"""Sizes of a program's block."""

PROGRAMS = 512
"""Programs that keep a large GPU busy."""


def best_codes(
    z: Float[Tensor, "tokens width"],
    codes: Float[Tensor, "codes width"],
    half_norms: Float[Tensor, " codes"],
) -> tuple[Float[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """Largest z · e - |e|^2 / 2 over the codes and its first index; -inf for a token with NaN."""
    slices = max(1, min(PROGRAMS // ceil(len(z) / TOKENS), ceil(len(codes) / CODES)))
    per_slice = ceil(len(codes) / slices / CODES) * CODES
    return _best_of_slices(z, codes, half_norms, slices, per_slice, None)


def best_codes_of_lists(
    z: Float[Tensor, "tokens width"],
    codes: Float[Tensor, "codes width"],
    half_norms: Float[Tensor, " codes"],
    lists: Int[Tensor, "groups tokens"],
    counts: Int[Tensor, " groups"],
) -> tuple[Float[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """What `best_codes` says, if each group of `CODES` codes meets some tokens alone; -inf for a
    token that is in no list.

    Args:
        lists: the tokens of each group, `counts` of them; what stands behind these is not read.
    """
    return _best_of_slices(z, codes, half_norms, len(lists), CODES, (lists, counts))


def _best_of_slices(
    z: Tensor,
    codes: Tensor,
    half_norms: Tensor,
    slices: int,
    per_slice: int,
    listed: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    z, codes = z.contiguous(), codes.contiguous()
    best = z.new_full((slices, len(z)), -torch.inf)
    ids = torch.zeros(slices, len(z), dtype=torch.int32, device=z.device)
    lists, counts = listed or (ids, ids)
    kernel: Any = _best_of_slice
    # Triton launches on the current device
    with torch.cuda.device_of(z):
        kernel[(ceil(len(z) / TOKENS), slices)](
            z,
            codes,
            half_norms.contiguous(),
            best,
            ids,
            lists,
            counts,
            len(z),
            len(codes),
            per_slice,
            z.shape[1],
            listed is not None,
            TOKENS,
            CODES,
            CHANNELS,
            num_warps=8,
        )
    # argmax promises the first of equals, and slices are in the order of ids
    winner = best.argmax(0, keepdim=True)
    return best.gather(0, winner)[0], ids.gather(0, winner)[0].long()


@triton.jit
def _best_of_slice(
    z,
    codes,
    half_norms,
    best,
    ids,
    lists,
    counts,
    tokens,
    count,
    per_slice,
    width: tl.constexpr,
    LISTED: tl.constexpr,
    TOKENS: tl.constexpr,
    CODES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = rows < tokens
    start = tl.program_id(1) * per_slice
    stop = tl.minimum(start + per_slice, count)
    if LISTED:
        listed = tl.load(counts + tl.program_id(1))
        here = rows < listed
        rows = tl.load(lists + tl.program_id(1) * tokens + rows, mask=here, other=0)
        # a program beyond the end of its list has nothing to do
        stop = tl.where(tl.program_id(0) * TOKENS < listed, stop, start)
    top = tl.full((TOKENS,), float("-inf"), tl.float32)
    chosen = tl.zeros((TOKENS,), tl.int32)
    for tile in range(start, stop, CODES):
        columns = tile + tl.arange(0, CODES)
        score = tl.zeros((TOKENS, CODES), tl.float32)
        for channel in range(0, width, CHANNELS):
            k = channel + tl.arange(0, CHANNELS)
            a = tl.load(
                z + rows[:, None] * width + k[None, :],
                mask=here[:, None] & (k[None, :] < width),
                other=0.0,
            )
            b = tl.load(
                codes + columns[None, :] * width + k[:, None],
                mask=(columns[None, :] < count) & (k[:, None] < width),
                other=0.0,
            )
            score = tl.dot(a, b, score, input_precision="ieee")
        # a column beyond the last code scores -inf
        half = tl.load(half_norms + columns, mask=columns < count, other=float("inf"))
        score = score - half[None, :]
        # whether a maximum keeps or skips NaN differs between backends
        score = tl.where(score == score, score, float("-inf"))
        value, local = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        wins = value > top
        chosen = tl.where(wins, tile + local, chosen)
        top = tl.where(wins, value, top)
    out = tl.program_id(1) * tokens + rows
    tl.store(best + out, top, mask=here)
    tl.store(ids + out, chosen, mask=here)
