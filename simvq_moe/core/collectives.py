"""Sums, samples and copies over all ranks, so that N ranks act as one on the joined batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

CALLS_OF_ENTROPY = 3
"""Collective calls of `mean_assignment_entropy`: sums, their gradient, and the number of tokens."""


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


def mean_assignment_entropy(
    summed: Float[Tensor, "*codes"], tokens: int, *, all_ranks: bool
) -> Float[Tensor, ""]:
    """Entropy, in nats, of the mean of soft assignments over tokens; it spreads codes.

    Args:
        summed: probabilities of each code, summed over this rank's tokens.
        all_ranks: over the tokens of all ranks, which call it together; in evaluation they may have
            different numbers of batches.
    """
    number = summed.new_full((), tokens)  # made on the device: a copy of it would wait
    if all_ranks:
        summed, number = differentiable_total(summed), total(number)
    # the slope of -p log p at 0 is infinite, and the probability of a far code underflows to 0
    mean = (summed / number.clamp_min(1)).clamp_min(torch.finfo(summed.dtype).tiny)
    return torch.special.entr(mean).sum()


def share_of_tokens(tokens: int, like: Tensor) -> Float[Tensor, ""]:
    """This rank's tokens over their mean over ranks; 0 where no rank has any."""
    mine = like.new_full((), float(tokens))
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return ranks * mine / total(mine).clamp_min(1)


def copy_from_rank_0(x: Tensor) -> None:
    """Overwrite x with rank 0's, against differences in the last bit between machines."""
    if dist.is_initialized():
        dist.broadcast(x, 0)


def sample(
    rows: Float[Tensor, "tokens width"], n: int, seed: int, parts: Sequence[int] | None = None
) -> Float[Tensor, "sampled width"]:
    """Up to n of all ranks' rows, drawn without replacement: the same rows on every rank.

    The draw depends on the seed and on the joined batch alone, whose first rows are those of the
    first part in rank order, and so on.

    Args:
        parts: how the rows of this rank are divided, into as many parts on every rank; None: not.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    on_host = torch.device("cpu")  # whatever device is the default
    mine = torch.tensor([len(rows)] if parts is None else list(parts), device=on_host)
    sizes = torch.zeros(len(mine), ranks, dtype=torch.int64, device=on_host)
    sizes[:, rank] = mine
    sizes = total(sizes.to(rows.device)).cpu().flatten()
    generator = torch.Generator(on_host).manual_seed(seed)
    chosen = torch.randperm(int(sizes.sum()), generator=generator, device=on_host)[:n]
    ends = sizes.cumsum(0)
    cell = torch.searchsorted(ends, chosen, right=True)
    within = chosen - (ends - sizes)[cell]
    here = cell % ranks == rank
    local = (within + (mine.cumsum(0) - mine)[cell // ranks])[here]
    picked = rows.new_zeros(len(chosen), rows.shape[1])
    picked[here.to(rows.device)] = rows[local.to(rows.device)]
    return total(picked)
