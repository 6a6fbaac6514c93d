"""Dispatch: sort assignments by expert, run contiguous slices, sum by gate.

Dropless unless a capacity is set. Memory is O(assignments x width): nothing is padded, and no
tokens x experts x capacity tensor exists.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from simvq_moe.core.ids import NOBODY
from simvq_moe.moe.routers.base import count


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
        owners = order // choices
        outputs = experts(x.index_select(0, owners), counts)
        weighted = gates.reshape(-1)[order, None].to(outputs.dtype) * outputs
        summed = outputs.new_zeros(tokens, outputs.shape[-1])
        return summed.index_add(0, owners, weighted)
    places = torch.empty_like(order).index_copy_(
        0, order, torch.arange(len(order), device=order.device)
    )
    places = places.view(tokens, choices)
    outputs = experts(sorted_rows(x, order, places), counts)
    return gated_sum(outputs, gates.to(outputs.dtype), order, places)


def sorted_rows(
    x: Float[Tensor, "tokens inner"],
    order: Int[Tensor, " assignments"],
    places: Int[Tensor, "tokens choices"],
) -> Float[Tensor, "assignments inner"]:
    """Row i is x of the token of assignment order[i].

    The gradient is a gather as well, a sum over choices: it has no atomics, so it repeats to the
    bit on every device, and it is several times faster than the gradient of x[order // choices].

    Args:
        order: assignments, token * choices + choice, in the order of the rows.
        places: its inverse, the row of each token's assignments.
    """
    rows = _SortedRows.apply(x, order, places)
    assert isinstance(rows, Tensor)
    return rows


def gated_sum(
    rows: Float[Tensor, "assignments width"],
    gates: Float[Tensor, "tokens choices"],
    order: Int[Tensor, " assignments"],
    places: Int[Tensor, "tokens choices"],
) -> Float[Tensor, "tokens width"]:
    """sum_j gates[:, j] * rows[places[:, j]], the way back of `sorted_rows`."""
    summed = _GatedSum.apply(rows, gates, order, places)
    assert isinstance(summed, Tensor)
    return summed


class _SortedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, order // places.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,) = ctx.saved_tensors
        return _weighted_rows(gradients[0].contiguous(), places, None), None, None


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gates, order, places)
        return _weighted_rows(rows, places, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, gates, order, places = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_rows = gradient.index_select(0, order // places.shape[1])
        of_gates = _products(gradient, rows, places) if ctx.needs_input_grad[1] else None
        of_rows.mul_(gates.reshape(-1).index_select(0, order)[:, None])
        return of_rows, of_gates, None, None


def _weighted_rows(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """Sums over j of weights[:, j] * rows[places[:, j]]; no weights: of the rows alone."""
    if rows.device.type == "cpu":  # one pass, without the gathered rows in memory
        return F.embedding_bag(places, rows, per_sample_weights=weights, mode="sum")
    gathered = rows.index_select(0, places.reshape(-1)).view(*places.shape, rows.shape[-1])
    return gathered.sum(1) if weights is None else torch.einsum("tk,tkw->tw", weights, gathered)


def _products(x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """Scalar products of x[i] and rows[places[i, j]]."""
    if rows.device.type == "cpu":  # one pass again: how embedding_bag finds its weights' gradient
        flat = torch.arange(places.numel(), device=places.device)
        bags = flat[:: places.shape[1]], flat // places.shape[1]
        product = torch.ops.aten._embedding_bag_per_sample_weights_backward
        return product(x, rows, places.reshape(-1), *bags, 0).view(places.shape)
    gathered = rows.index_select(0, places.reshape(-1)).view(*places.shape, rows.shape[-1])
    return torch.einsum("tw,tkw->tk", x, gathered)


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
