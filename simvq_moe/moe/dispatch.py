"""Dispatch: sort assignments by expert, run contiguous slices, sum by gate.

Dropless unless a capacity is set. Memory is O(assignments x width): nothing is padded, and no
tokens x experts x capacity tensor exists.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.moe.router import NOBODY, count


def dispatch(
    x: Float[Tensor, "tokens inner"],
    ids: Int[Tensor, "tokens choices"],
    gates: Float[Tensor, "tokens choices"],
    experts: Callable[[Tensor, Tensor], Tensor],
    number: int,
    *,
    open_choices: bool = False,
) -> Float[Tensor, "tokens width"]:
    """sum_j gates[:, j] * E_{ids[:, j]}(x) over `number` experts.

    Args:
        experts: maps rows sorted by expert and the number of rows of each expert to outputs.
        open_choices: some ids may be `NOBODY`, whose term is 0.
    """
    tokens, choices = ids.shape
    order = ids.reshape(-1).argsort(stable=True)
    counts = count(ids, number)
    if open_choices:
        order = order[len(order) - int(counts.sum()) :]  # open ones sort first
    outputs = experts(x[order // choices], counts)
    if open_choices:
        weighted = gates.reshape(-1)[order, None].to(outputs.dtype) * outputs
        summed = outputs.new_zeros(tokens, outputs.shape[-1])
        return summed.index_add(0, order // choices, weighted)
    # a gather by the inverse order sums without atomics, so it repeats to the bit on every device
    inverse = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)).to(order))
    chosen = outputs[inverse].view(tokens, choices, outputs.shape[-1])
    return torch.einsum("tk,tkw->tw", gates.to(chosen.dtype), chosen)


def within_capacity(
    ids: Int[Tensor, "tokens choices"], experts: int, capacity_factor: float
) -> Int[Tensor, "tokens choices"]:
    """ids with `NOBODY` in place of what an expert has no room for (GShard, arXiv:2006.16668).

    An expert takes at most ceil(capacity_factor * assignments / experts) of this batch: first
    choices before second ones, earlier tokens before later ones.
    """
    room = ceil(capacity_factor * ids.numel() / experts)
    by_choice = ids.T.reshape(-1)
    order = by_choice.argsort(stable=True)
    counts = count(ids, experts)
    open_choices = ids.numel() - counts.sum()
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]]) + open_choices
    places = torch.arange(len(order), device=ids.device) - starts[by_choice[order].clamp_min(0)]
    kept = torch.where(places < room, by_choice[order], NOBODY)
    return torch.empty_like(by_choice).index_copy_(0, order, kept).view(ids.T.shape).T
