"""Models of which a rank holds a share from the start: never all of them, on the host or a device.

Inside `in_shares` a model gives each of its pieces to `keep_share` once it is made: of every
parameter in it the rank keeps consecutive elements, as large a part as any rank's. Nothing is
exchanged, because every rank draws the same numbers. What is set of a piece later is set inside
`opened`. Elsewhere both do nothing.

A parameter that is away keeps its shape, and every element reads as NaN, one that takes the room of
all: sizes can be counted, and what would compute with it shows.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

Piece = TypeVar("Piece", bound=nn.Module)

_place: ContextVar[tuple[int, int] | None] = ContextVar("place", default=None)


@dataclass
class Share:
    """A rank's part of a parameter."""

    data: Tensor
    """The elements, in one dimension; of the last ranks filled up with zeros."""
    rank: int
    ranks: int
    away: bool = False
    """Whether this is all that the rank holds of the parameter."""


@contextmanager
def in_shares(rank: int, ranks: int) -> Iterator[None]:
    """Models that are built inside keep this rank's share of what they give to `keep_share`."""
    before = _place.set((rank, ranks))
    try:
        yield
    finally:
        _place.reset(before)


def keep_share(piece: Piece) -> Piece:
    """The piece, of whose parameters this rank keeps its share alone, inside `in_shares`."""
    place = _place.get()
    if place is None:
        return piece
    rank, ranks = place
    for p in piece.parameters():
        share = Share(p.new_zeros(-(-p.numel() // ranks)), rank, ranks)
        p.share = share  # pyright: ignore[reportAttributeAccessIssue]
        put_away(p)
    give_back()
    return piece


@contextmanager
def opened(piece: nn.Module) -> Iterator[None]:
    """Inside, a piece that is away can be set, by all ranks alike; it is not to be read, because
    what other ranks hold of it is NaN."""
    away = [p for p in piece.parameters() if is_away(p)]
    for p in away:
        bring(p, p.new_full(p.shape, torch.nan))
    yield
    for p in away:
        put_away(p)
    if away:
        give_back()


def share_of(p: Tensor) -> Share | None:
    """The share that this rank keeps of a parameter; None: it keeps all of it."""
    return getattr(p, "share", None)


def is_away(p: Tensor) -> bool:
    """Whether all that this rank holds of a parameter is its share."""
    share = share_of(p)
    return share is not None and share.away


@torch.no_grad()
def put_away(p: Tensor) -> None:
    """Keep of a parameter its share alone."""
    share = share_of(p)
    assert share is not None
    own = _own(p, share)
    share.data[: len(own)] = own
    p.data = nothing_of(p, p.device)
    share.away = True


@torch.no_grad()
def bring(p: Tensor, whole: Tensor) -> None:
    """Let a parameter that is away be this tensor, into which its share is written."""
    share = share_of(p)
    assert share is not None
    own = _own(whole, share)
    own.copy_(share.data[: len(own)])
    p.data = whole
    share.away = False


def nothing_of(p: Tensor, device: torch.device) -> Tensor:
    """A tensor of a parameter's shape that takes the room of one element."""
    return torch.full((), torch.nan, dtype=p.dtype, device=device).expand(p.shape)


def give_back() -> None:
    """Let glibc return what is free: shares lie between what pieces have left, which would grow to
    more than the whole model."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def move(model: nn.Module, device: torch.device) -> None:
    """`model.to(device)`, of what is away the share alone."""

    def moved(tensor: Tensor) -> Tensor:
        share = share_of(tensor)
        if share is None or not share.away:
            return tensor.to(device)
        share.data = share.data.to(device)
        return nothing_of(tensor, device)

    model._apply(moved)


def _own(whole: Tensor, share: Share) -> Tensor:
    """The elements of a whole parameter that are the share's."""
    size = len(share.data)
    flat = whole.detach().view(-1)
    return flat[share.rank * size : (share.rank + 1) * size]
