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


class _Total(torch.autograd.Function):
    """`total`; its backward adds too, so that gradients averaged over ranks come out right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return total(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return total(gradients[0])


def differentiable_total(x: Tensor) -> Tensor:
    """The sum of x over all ranks, where every rank's loss has the sum in it."""
    if not dist.is_initialized():
        return x
    added = _Total.apply(x)
    assert isinstance(added, Tensor)
    return added


def share_of_tokens(tokens: int, like: Tensor) -> Float[Tensor, ""]:
    """This rank's tokens over their mean over ranks; 0 where no rank has any."""
    mine = torch.tensor(float(tokens), dtype=like.dtype, device=like.device)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return ranks * mine / total(mine).clamp_min(1)


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
