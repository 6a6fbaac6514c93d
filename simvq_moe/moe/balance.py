"""Losses that even out or tame the router: load-balance loss and z-loss, each of one layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.moe.routers.base import Routing


def load_balance_loss(
    logits: Float[Tensor, "tokens experts"], counts: Int[Tensor, " experts"]
) -> Float[Tensor, ""]:
    """N sum_i f_i P_i (Switch Transformer, arXiv:2101.03961, eq. 4); 1 when both are even.

    f_i is the share of all assignments, over all top_k choices, that go to expert i; P_i the mean
    probability that the router gives it. Only P has a gradient.

    Args:
        counts: assignments of each expert, summed over ranks if the loss is to be the same however
            the global batch is split.
    """
    share = (counts / counts.sum().clamp_min(1)).to(logits.dtype)
    return len(counts) * (share * logits.softmax(-1).mean(0)).sum()


def z_loss(logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, ""]:
    """Mean squared logsumexp of the logits (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return logits.logsumexp(-1).square().mean()


def mean_losses(routings: Sequence[Routing], *, all_ranks: bool) -> dict[str, Tensor]:
    """The mean over layers of each layer's "balance" and "z" loss and of its router's own losses.

    Args:
        all_ranks: count assignments over all ranks, in one all-reduce that every rank must join.
    """
    stacked = torch.stack([routing.counts for routing in routings])
    if all_ranks and dist.is_initialized():
        dist.all_reduce(stacked)
    pairs = zip(routings, stacked, strict=True)
    terms = {
        "balance": [load_balance_loss(r.logits, n) for r, n in pairs],
        "z": [z_loss(r.logits) for r in routings],
    }
    for name in routings[0].losses:
        terms[name] = [r.losses[name] for r in routings]
    return {name: torch.stack(values).mean() for name, values in terms.items()}
