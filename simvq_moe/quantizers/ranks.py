"""Sums, samples and copies over all ranks, so that N ranks act as one on the joined batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def total(x: Tensor) -> Tensor:
    """The sum of x over all ranks."""
    x = x.clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


class _Mean(torch.autograd.Function):
    """Mean over ranks; its backward sums, so that gradients averaged over ranks come out right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return total(x) / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return total(gradients[0]) / dist.get_world_size()


def mean_over_ranks(x: Tensor) -> Tensor:
    """The differentiable mean of x over all ranks."""
    if not dist.is_initialized():
        return x
    mean = _Mean.apply(x)
    assert isinstance(mean, Tensor)
    return mean


def copy_from_rank_0(x: Tensor) -> None:
    """Overwrite x with rank 0's, against differences in the last bit between machines."""
    if dist.is_initialized():
        dist.broadcast(x, 0)


def sample(
    rows: Float[Tensor, "tokens width"], n: int, seed: int
) -> Float[Tensor, "sampled width"]:
    """Up to n of all ranks' rows, drawn without replacement: the same rows on every rank.

    The draw depends on the seed and on the joined batch in rank order alone.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sizes = torch.zeros(ranks, dtype=torch.int64, device=rows.device)
    sizes[rank] = len(rows)
    sizes = total(sizes).cpu()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(int(sizes.sum()), generator=generator)[:n]
    local = chosen - int(sizes[:rank].sum())
    mine = (local >= 0) & (local < len(rows))
    picked = rows.new_zeros(len(chosen), rows.shape[1])
    picked[mine.to(rows.device)] = rows[local[mine].to(rows.device)]
    return total(picked)
