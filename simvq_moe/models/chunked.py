"""A long signal in pieces: what convolutions make of each piece, as if they had seen it whole.

Each piece is given the neighbours that its outcome depends on, and what they spoil at its ends is
dropped, as in the chunked inference of DAC (arXiv:2306.06546). Only the true ends are padded.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor, nn


def reach(layers: nn.Module, step: int | Fraction) -> Fraction:
    """How far to one side an outcome of these convolutions depends on what they are given, at most.

    Args:
        layers: Conv1d and ConvTranspose1d in the order in which they apply; what stands between
            them sees one value at a time.
        step: of what the first is given, in any unit.
    """
    found, at = Fraction(0), Fraction(step)
    for layer in layers.modules():
        if isinstance(layer, nn.ConvTranspose1d):
            found += ceil(layer.kernel_size[0] / layer.stride[0]) * at
            at /= layer.stride[0]
        elif isinstance(layer, nn.Conv1d):
            (kernel,), (dilation,) = layer.kernel_size, layer.dilation
            before = int(layer.padding[0])
            found += max(before, (kernel - 1) * dilation - before) * at
            at *= layer.stride[0]
    return found


def in_chunks(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    chunk: int,
    reach: int,
    read: int = 1,
    written: int = 1,
) -> Tensor:
    """function(x) along the second axis, some tokens at a time.

    Args:
        function: of a piece of x, which has `written` values a token where x has `read`.
        chunk: tokens at a time, at least 1.
        reach: tokens to either side that a token's outcome depends on.

    Raises:
        ValueError: chunk is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk {chunk} must be at least 1 token; None is all at once")
    tokens = -(-x.shape[1] // read)
    found = []
    for first in range(0, tokens, chunk):
        end = min(first + chunk, tokens)
        begin = max(0, first - reach)
        outcome = function(x[:, begin * read : (end + reach) * read])
        found.append(outcome[:, (first - begin) * written : (end - begin) * written])
    return torch.cat(found, dim=1)
