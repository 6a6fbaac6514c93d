"""Moments of vectors over the tokens of all ranks, and maps that start from them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from simvq_moe.core.bank import Bank


@torch.no_grad()
def moments(
    x: Float[Tensor, "tokens width"],
) -> tuple[Float[Tensor, " width"], Float[Tensor, "width width"]]:
    """Mean and covariance over the tokens of all ranks, in float64."""
    x = x.double()
    sums = torch.cat([x.sum(0), x.new_full((1,), len(x))])
    if dist.is_initialized():
        dist.all_reduce(sums)
    mean = sums[:-1] / sums[-1]
    covariance = (x - mean).T @ (x - mean)
    if dist.is_initialized():
        dist.all_reduce(covariance)
    return mean, covariance / sums[-1]


@torch.no_grad()
def match_shape(bank: Bank, covariance: Float[Tensor, "width width"]) -> None:
    """Set W to the root of the covariance (its diagonal), scaled to the identity's length.

    Rows of a random base then lie along the data's principal directions, and are as long on average
    as they were.

    Raises:
        ValueError: the bank's map is neither full nor diagonal.
    """
    if bank.W is None or not bank.shared:
        raise ValueError(f"a map of kind {bank.transform!r} can't start from data: use 'linear'")
    if bank.transform == "diagonal":
        root = covariance.diagonal().sqrt()
    else:
        variances, axes = torch.linalg.eigh(covariance)
        root = axes * variances.clamp_min(0).sqrt() @ axes.T
    bank.W.copy_(root * (bank.width**0.5 / root.norm()))
