"""Tensors that number something: rows of a codebook, experts, tokens of a vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

NOBODY = -1
"""Expert id of a choice that is left open."""


def as_ids(ids: Tensor, name: str = "ids") -> Tensor:
    """The same numbers as int64, which alone every operation takes for what they are.

    torch reads uint8, as it does booleans, as a mask where it indexes, and overflows narrow ones.

    Raises:
        ValueError: they are no integers.
    """
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"{name} of {ids.dtype}: give integers")
    return ids.to(torch.int64)
