"""Losses that even out or tame the router: load-balance loss and z-loss, each of one layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.moe.router import Routing


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
    """The mean over layers of each layer's "balance" and "z" loss.

    Args:
        all_ranks: count assignments over all ranks, in one all-reduce that every rank must join.
    """
    experts = routings[0].logits.shape[-1]
    counts = [torch.bincount(routing.ids.reshape(-1), minlength=experts) for routing in routings]
    stacked = torch.stack(counts)
    if all_ranks and dist.is_initialized():
        dist.all_reduce(stacked)
    pairs = zip(routings, stacked, strict=True)
    return {
        "balance": torch.stack([load_balance_loss(r.logits, n) for r, n in pairs]).mean(),
        "z": torch.stack([z_loss(r.logits) for r in routings]).mean(),
    }
