"""The losses of mixtures in the loss of a model: balance, z-loss, and those of routers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from simvq_moe.moe.balances.base import load_balance_loss
from simvq_moe.moe.routers.base import Routing


def z_loss(logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, ""]:
    """Mean squared logsumexp of the logits (ST-MoE, arXiv:2202.08906, eq. 5); 0 of no tokens."""
    if not len(logits):
        return logits.sum()
    return logits.logsumexp(-1).square().mean()


def mean_losses(
    routings: Sequence[Routing],
    *,
    all_ranks: bool,
    balance: Callable[[Tensor, Tensor], Tensor] = load_balance_loss,
) -> dict[str, Tensor]:
    """The mean over layers of each layer's "balance" and "z" loss and of its router's own losses.

    Args:
        all_ranks: count assignments over all ranks, in one all-reduce that every rank must join.
        balance: the loss of one layer, from its logits and the assignments of each expert.
    """
    stacked = torch.stack([routing.counts for routing in routings])
    if all_ranks and dist.is_initialized():
        dist.all_reduce(stacked)
    pairs = zip(routings, stacked, strict=True)
    terms = {
        "balance": [balance(r.logits, n) for r, n in pairs],
        "z": [z_loss(r.logits) for r in routings],
    }
    for name in routings[0].losses:
        terms[name] = [r.losses[name] for r in routings]
    return {name: torch.stack(values).mean() for name, values in terms.items()}
