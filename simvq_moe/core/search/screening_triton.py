"""The search of `nearest_triton` with most codes ruled out by a bfloat16 product on tensor cores.

One product of latents and codes in bfloat16, summed up in float32, gives the largest score of each
group of codes; of each token those groups remain that the bound on rounding (`screening`) lets win,
against the best of this tile and of the tiles before. The float32 kernel then meets each group with
the tokens that it remains for, and gives the same score to the bit as it does for all codes, so the
ids are the same. Nothing waits for the device.

Tensor cores add up by cutting bits off rather than by rounding, the terms of a block aligned to the
largest: for each term and each block an error of at most 2^-23 of the largest (Fasi, Higham,
Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores, 2021). `SUMS` covers blocks of one.
"""

from __future__ import annotations

import os
from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from simvq_moe.core.search.nearest_triton import CODES, best_codes_of_lists
from simvq_moe.core.search.screening import V, terms_of_groups, terms_of_tokens

TOKENS, CHANNELS = 128, 64
"""Sizes of a program's block; its codes are a group, the block of `nearest_triton`."""

SUMS = 4
"""Roundoffs of float32 (2^-24) that one term may cost a sum."""


def best_screened(
    z: Float[Tensor, "tokens width"],
    codes: Float[Tensor, "codes width"],
    half_norms: Float[Tensor, " codes"],
    best: Float[Tensor, " tokens"],
) -> tuple[Float[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """What `best_codes` says wherever it is more than `best`, which earlier codes have; elsewhere
    it may say less.

    Memory: about 45 bytes a token for each `CODES` codes.
    """
    lists, counts = listed(groups_that_may_win(z, codes, half_norms, best))
    return best_codes_of_lists(z, codes, half_norms, lists, counts)


def groups_that_may_win(
    z: Float[Tensor, "tokens width"],
    codes: Float[Tensor, "codes width"],
    half_norms: Float[Tensor, " codes"],
    best: Float[Tensor, " tokens"],
) -> Bool[Tensor, "groups tokens"]:
    """True where a group of `CODES` codes may have a larger float32 score than all others and than
    `best`."""
    z16, codes16 = z.bfloat16(), codes.bfloat16()
    top = _top_of_groups(z16, codes16, half_norms)
    sums = SUMS * (z.shape[1] + 8) * V
    length, error = _group_max((2 * half_norms).sqrt()), _group_max((codes - codes16).norm(dim=1))
    of_groups = terms_of_groups(length, error, length, sums * length * length, sums, z.shape[1])
    # 1 % covers the rounding of the lengths and of this bound itself
    slack = (of_groups @ terms_of_tokens(z, z16, z.norm(dim=1), sums)).mul_(1.01)
    least = torch.maximum((top - slack).amax(0), best)
    # NaN compares false: a token whose bound overflows keeps every group
    return ~(top + slack < least)


def listed(
    keep: Bool[Tensor, "groups tokens"],
) -> tuple[Int[Tensor, "groups tokens"], Int[Tensor, " groups"]]:
    """The tokens of each group, in order, and how many they are; behind these stands anything."""
    place = keep.cumsum(1, dtype=torch.int32)
    tokens = torch.arange(keep.shape[1], dtype=torch.int32, device=keep.device)
    # those that are not kept are written behind the end, where nobody reads
    end = keep.shape[1]
    lists = torch.empty(len(keep), end + 1, dtype=torch.int32, device=keep.device)
    lists.scatter_(1, torch.where(keep, place - 1, end).long(), tokens.expand_as(place))
    return lists[:, :end].contiguous(), place[:, -1].contiguous()


def _group_max(of_codes: Float[Tensor, " codes"]) -> Float[Tensor, " groups"]:
    """The largest of each group; NaN where one is."""
    missing = -len(of_codes) % CODES
    return torch.nn.functional.pad(of_codes, (0, missing)).unflatten(0, (-1, CODES)).amax(1)


def _top_of_groups(
    z16: Tensor, codes16: Tensor, half_norms: Tensor
) -> Float[Tensor, "groups tokens"]:
    groups = ceil(len(codes16) / CODES)
    top = half_norms.new_empty(groups, len(z16))
    kernel: Any = _top_of_group
    with torch.cuda.device_of(z16):
        kernel[(ceil(len(z16) / TOKENS), groups)](
            z16.contiguous(),
            codes16.contiguous(),
            half_norms.contiguous(),
            top,
            len(z16),
            len(codes16),
            z16.shape[1],
            os.environ.get("TRITON_INTERPRET") == "1",
            TOKENS,
            CODES,
            CHANNELS,
            num_warps=8,
        )
    return top


@triton.jit
def _top_of_group(
    z16,
    codes16,
    half_norms,
    top,
    tokens,
    count,
    width: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TOKENS: tl.constexpr,
    CODES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * CODES + tl.arange(0, CODES)
    score = tl.zeros((TOKENS, CODES), tl.float32)
    for channel in range(0, width, CHANNELS):
        k = channel + tl.arange(0, CHANNELS)
        a = tl.load(
            z16 + rows[:, None] * width + k[None, :],
            mask=(rows[:, None] < tokens) & (k[None, :] < width),
            other=0.0,
        )
        b = tl.load(
            codes16 + columns[None, :] * width + k[:, None],
            mask=(columns[None, :] < count) & (k[:, None] < width),
            other=0.0,
        )
        if INTERPRETED:  # which multiplies the bits of bfloat16 as if they were integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        score = tl.dot(a, b, score)
    # a column beyond the last code scores -inf
    half = tl.load(half_norms + columns, mask=columns < count, other=float("inf"))
    value = tl.max(score - half[None, :], 1)
    tl.store(top + tl.program_id(1) * tokens + rows, value, mask=rows < tokens)
