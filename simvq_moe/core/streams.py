"""Random streams that keep paired arms paired.

Two arms of a comparison start from the same weights wherever their shapes agree. A part whose
shape differs between arms draws from a stream of its own, so that the rest draws the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

GRAIN = 16
"""Numbers that torch draws together from N(0, 1) on CPUs, the last ones with those before them."""
CHUNK = 2**20
"""Numbers that are drawn at once of a tensor of which a part is kept."""


@contextmanager
def own_stream() -> Iterator[None]:
    """Random numbers drawn inside leave those drawn after it unchanged, however many they are."""
    seed = int(torch.randint(2**62, (), device="cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def normal_part(
    shape: tuple[int, ...], std: float, part: tuple[int, int] = (0, 1), *, chunk: int = CHUNK
) -> Float[Tensor, "part ..."]:
    """The i-th of n equal parts, along the first axis, of a tensor drawn from N(0, std).

    The numbers are those of the part in the whole tensor, and so are all that are drawn later, but
    there is no more memory than of the part and a chunk.

    Args:
        shape: of the whole tensor.
        part: (i, n).
        chunk: numbers at once, a multiple of `GRAIN`.
    """
    number, parts = part
    own = torch.empty(shape[0] // parts, *shape[1:])
    if parts == 1:
        return own.normal_(std=std)
    kept, total = own.view(-1), prod(shape)
    first = number * len(kept)
    room = torch.empty(min(total, chunk + GRAIN))
    starts = range(0, max(total - GRAIN, 0) + 1, chunk)  # of too few at the end numbers differ
    for start, end in zip(starts, (*starts[1:], total), strict=True):
        drawn = room[: end - start].normal_(std=std)
        begin, stop = max(start, first), min(end, first + len(kept))
        if begin < stop:
            kept[begin - first : stop - first] = drawn[begin - start : stop - start]
    return own
