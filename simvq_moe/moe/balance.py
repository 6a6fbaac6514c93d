"""Losses that even out or tame the router: load-balance loss and z-loss, one layer at a time."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor


def load_balance_loss(
    logits: Float[Tensor, "tokens experts"], ids: Int[Tensor, "tokens top_k"], *, all_ranks: bool
) -> Float[Tensor, ""]:
    """N sum_i f_i P_i (Switch Transformer, arXiv:2101.03961, eq. 4); 1 when both are even.

    f_i is the share of all assignments, over all top_k choices, that go to expert i; P_i the mean
    probability that the router gives it. Only P has a gradient.

    Args:
        all_ranks: count f over all ranks, so that the loss is the same however the global batch is
            split. A collective call: every rank must make it.
    """
    experts = logits.shape[-1]
    counts = torch.bincount(ids.reshape(-1), minlength=experts)
    if all_ranks and dist.is_initialized():
        dist.all_reduce(counts)
    share = counts / counts.sum().clamp_min(1)
    return experts * (share.to(logits.dtype) * logits.softmax(-1).mean(0)).sum()


def z_loss(logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, ""]:
    """Mean squared logsumexp of the logits (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return logits.logsumexp(-1).square().mean()
