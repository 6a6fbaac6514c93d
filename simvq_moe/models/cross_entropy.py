"""Cross entropy of scores that are never whole: with a vocabulary of 50,000 those of one batch, and
their gradient, would take more memory than all layers below.

Tokens go through the matrix of the head in pieces. In training a piece's scores also give their
part of both gradients at once, because the gradient of a score is its share minus 1 where it is the
target's: so no product is made twice (the way of Liger Kernel, arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

LARGEST = {"cpu": 2**25, "cuda": 2**28}
"""Bytes of scores, by type of device, that are made at once: so many that products stay fast."""
IGNORED = -100
"""A target that is none, as in torch."""


def mean_cross_entropy(
    x: Float[Tensor, "tokens width"],
    matrix: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, " tokens"],
    *,
    largest: int | None = None,
) -> Float[Tensor, ""]:
    """Mean nats of the targets under the softmax of `x @ matrix.T`, in float32 at least.

    Args:
        targets: ids, or `IGNORED` where there is nothing to predict.
        largest: bytes of scores that are made at once; None: those of the device.
    """
    rows = _rows(x, matrix, largest)
    if len(x) <= rows:
        return F.cross_entropy(_scores(x, matrix), targets)
    if not torch.is_grad_enabled():
        nats = token_cross_entropy(x, matrix, targets, largest=largest)
        return nats.sum() / (targets != IGNORED).sum()
    return _MeanInPieces.apply(x, matrix, targets, rows)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def token_cross_entropy(
    x: Float[Tensor, "tokens width"],
    matrix: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, " tokens"],
    *,
    largest: int | None = None,
) -> Float[Tensor, " tokens"]:
    """Nats of each target, 0 for what is ignored; without a gradient. See `mean_cross_entropy`."""
    pieces = _pieces(len(x), _rows(x, matrix, largest))
    parts = [
        F.cross_entropy(_scores(x[piece], matrix), targets[piece], reduction="none")
        for piece in pieces
    ]
    return torch.cat(parts)


class _MeanInPieces(torch.autograd.Function):
    """The mean of all tokens' nats, and the gradients of their sum, made together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, targets: Tensor, rows: int) -> Tensor:
        dtype = _dtype(x)
        nats = torch.empty(len(x), dtype=dtype, device=x.device)
        of_x = torch.empty_like(x, dtype=dtype)
        # added up over pieces in more than bfloat16's 8 bits
        of_matrix = torch.zeros_like(matrix, dtype=dtype)
        for piece in _pieces(len(x), rows):
            nats[piece], of_scores = _of_piece(x[piece], matrix, targets[piece])
            of_x[piece] = of_scores @ matrix
            of_matrix += of_scores.T @ x[piece]
            del of_scores  # before the next ones are made
        counted = (targets != IGNORED).sum()
        ctx.save_for_backward(of_x, of_matrix, counted)
        ctx.dtypes = x.dtype, matrix.dtype
        return nats.sum() / counted

    # the decorator loses the names of parameters
    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        of_x, of_matrix, counted = ctx.saved_tensors
        scale = grads[0] / counted
        x_dtype, matrix_dtype = ctx.dtypes
        return (of_x * scale).to(x_dtype), (of_matrix * scale).to(matrix_dtype), None, None


def _of_piece(x: Tensor, matrix: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of tokens, and the gradient of their scores."""
    log_shares = F.log_softmax(_scores(x, matrix), 1)
    nats = F.nll_loss(log_shares, targets, reduction="none")
    shares = log_shares.exp_()
    target = targets.clamp(min=0)[:, None]
    shares.scatter_add_(1, target, shares.new_full((), -1.0).expand(target.shape))
    return nats, shares.masked_fill_((targets == IGNORED)[:, None], 0.0).to(x.dtype)


def _scores(x: Tensor, matrix: Tensor) -> Tensor:
    return F.linear(x, matrix).to(_dtype(x))


def _dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rows(x: Tensor, matrix: Tensor, largest: int | None) -> int:
    """Tokens of a piece."""
    bound = LARGEST.get(x.device.type, LARGEST["cuda"]) if largest is None else largest
    return max(1, bound // (matrix.shape[0] * _dtype(x).itemsize))


def _pieces(tokens: int, rows: int) -> Iterator[slice]:
    # one at least: a batch may be empty
    return (slice(start, start + rows) for start in range(0, max(tokens, 1), rows))
