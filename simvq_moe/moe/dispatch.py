"""Dropless dispatch: sort assignments by expert, run contiguous slices, sum by gate.

Memory is O(tokens x top_k x width); nothing is padded and no token is dropped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def dispatch(
    x: Float[Tensor, "tokens width"],
    ids: Int[Tensor, "tokens top_k"],
    gates: Float[Tensor, "tokens top_k"],
    experts: Callable[[Tensor, Tensor], Tensor],
    count: int,
) -> Float[Tensor, "tokens width"]:
    """sum_j gates[:, j] * E_{ids[:, j]}(x) over `count` experts.

    Args:
        experts: maps rows sorted by expert and the number of rows of each expert to outputs.
    """
    tokens, top_k = ids.shape
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=count)
    outputs = experts(x[order // top_k], counts)
    # a gather by the inverse order sums without atomics, so it repeats to the bit on every device
    inverse = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)).to(order))
    chosen = outputs[inverse].view(tokens, top_k, x.shape[-1])
    return torch.einsum("tk,tkw->tw", gates.to(chosen.dtype), chosen)
