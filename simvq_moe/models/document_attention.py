"""Causal attention of packed documents, each of which sees itself alone, without a mask of every
query with every key.

On a CPU documents of about one length are rows of a batch of their own: the keys that fill a row up
lie behind its document, where causal attention does not look, so no mask is needed at all. On a GPU
FlexAttention (arXiv:2412.05496) leaves out blocks of keys in which there is nothing to see, and the
host waits for no number. A mask is made where neither can run, and for windows so short that it is
no larger than a row of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What each query has seen, of queries, keys and values (batch, tokens, heads, channels)."""
BLOCK = 128
"""Tokens of a block of FlexAttention, which windows of no more than that are not worth."""
LEAST_CHANNELS, LEAST_CAPABILITY = 16, (8, 0)
"""Channels of a head, and a GPU's capability, that FlexAttention's kernels need."""


class Documents(NamedTuple):
    """The documents in packed windows; the end of a document belongs to it."""

    positions: Int[Tensor, "batch tokens"]
    """Place of each token from the start of its document, or of the window."""
    attend: Attend
    """Attention in which a query sees its document up to itself."""


def documents_of(
    tokens: Int[Tensor, "batch tokens"], end_of_text: Int[Tensor, ""], channels: int
) -> Documents:
    """Where documents lie in windows of tokens, from the ends of text in them.

    Args:
        channels: of a head.
    """
    starts = (tokens == end_of_text).roll(1, dims=1)
    starts[:, :1] = True
    place = torch.arange(tokens.shape[1], device=tokens.device)
    positions = place - torch.where(starts, place, 0).cummax(1).values
    if tokens.device.type == "cpu":
        return Documents(positions, InBuckets(positions))
    numbers = starts.cumsum(1)
    flexible = tokens.shape[1] > BLOCK and channels >= LEAST_CHANNELS and _has_flex(tokens.device)
    return Documents(positions, (InBlocks if flexible else InMask)(numbers))


class InBuckets:
    """Documents of about one length together, as rows of one batch, for each such length.

    Args:
        positions: of every token in its document.
    """

    def __init__(self, positions: Int[Tensor, "batch tokens"]) -> None:
        places, lengths = _starts_and_lengths(positions)
        self.rows: list[Tensor] = []
        """The tokens of each bucket's documents; one that is short repeats its last."""
        self.where = torch.empty(positions.numel(), dtype=torch.long)
        """Each token's place among those of all rows, one after the other."""
        before, sizes = 0, row_length(lengths)
        for size in sizes.unique().tolist():
            chosen = sizes == size
            along = torch.arange(size)
            inside = along < lengths[chosen, None]
            rows = places[chosen, None] + torch.minimum(along, lengths[chosen, None] - 1)
            self.where[rows[inside]] = before + inside.flatten().nonzero().flatten()
            self.rows.append(rows)
            before += rows.numel()

    def __call__(
        self,
        q: Float[Tensor, "batch tokens heads channels"],
        k: Float[Tensor, "batch tokens heads channels"],
        v: Float[Tensor, "batch tokens heads channels"],
    ) -> Float[Tensor, "batch tokens heads channels"]:
        return _uncompiled(self, q, k, v)


def _seen_in_rows(buckets: InBuckets, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat = [part.flatten(0, 1) for part in (q, k, v)]
    seen = []
    for rows in buckets.rows:
        queries, keys, values = (part[rows].transpose(1, 2) for part in flat)
        found = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        seen.append(found.transpose(1, 2).flatten(0, 1))
    # an empty batch has no documents
    return torch.cat(seen)[buckets.where].view_as(v) if seen else v


# rows have other shapes in every batch: a graph of them would be compiled for each
_uncompiled: Any = torch.compiler.disable(_seen_in_rows)


class InBlocks:
    """Attention by FlexAttention, compiled when it first runs.

    Args:
        numbers: of the document of every token.
    """

    def __init__(self, numbers: Int[Tensor, "batch tokens"]) -> None:
        batch, tokens = numbers.shape
        self.blocks = _flex("create_block_mask")(
            lambda row, _, query, key: (numbers[row, query] == numbers[row, key]) & (query >= key),
            B=batch,
            H=None,
            Q_LEN=tokens,
            KV_LEN=tokens,
            device=numbers.device,
        )

    def __call__(
        self,
        q: Float[Tensor, "batch tokens heads channels"],
        k: Float[Tensor, "batch tokens heads channels"],
        v: Float[Tensor, "batch tokens heads channels"],
    ) -> Float[Tensor, "batch tokens heads channels"]:
        attend = _flex("flex_attention")
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return attend(q, k, v, block_mask=self.blocks).transpose(1, 2)


class InMask:
    """Attention by a mask of every query with every key, which all layers share.

    Args:
        numbers: of the document of every token.
    """

    def __init__(self, numbers: Int[Tensor, "batch tokens"]) -> None:
        place = torch.arange(numbers.shape[1], device=numbers.device)
        self.mask = (numbers[:, :, None] == numbers[:, None]) & (place[:, None] >= place)

    def __call__(
        self,
        q: Float[Tensor, "batch tokens heads channels"],
        k: Float[Tensor, "batch tokens heads channels"],
        v: Float[Tensor, "batch tokens heads channels"],
    ) -> Float[Tensor, "batch tokens heads channels"]:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:, None])
        return y.transpose(1, 2)


def row_length(lengths: Int[Tensor, " documents"]) -> Int[Tensor, " documents"]:
    """The length of the row that a document is filled up to: one of four in every octave, so that
    rows are an eighth longer on average and a quarter at most, and their lengths are few."""
    step = 2 ** (lengths.clamp(min=4).log2().floor().long() - 2)
    return (lengths + step - 1) // step * step


def _starts_and_lengths(positions: Int[Tensor, "batch tokens"]) -> tuple[Tensor, Tensor]:
    """Start and length of every document, the start as its place among all tokens."""
    places = (positions.flatten() == 0).nonzero().flatten()
    ends = torch.cat([places[1:], places.new_tensor([positions.numel()])])[: len(places)]
    return places, ends - places


def _has_flex(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


@cache
def _flex(name: str) -> Any:
    """A function of FlexAttention, compiled, because as it comes it makes the whole mask."""
    from torch.nn.attention import flex_attention  # its import takes long

    return torch.compile(getattr(flex_attention, name))
