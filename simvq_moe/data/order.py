"""Which examples a step sees, and which keys are held out: functions of seeds and keys alone.

Random permutations, one an epoch, are laid end to end, and step s takes the positions from
s * batch on. The step number is therefore the whole state of the reader: a resumed run and a run
on another number of ranks see the same global batches.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int64
from torch import Tensor

Indices = Int[np.ndarray, " batch"] | Int[Tensor, " batch"]


class Share(NamedTuple):
    """This rank's part of every global batch.

    Ranks share every micro-batch, so that it is the same one whatever their number.
    """

    batch: int
    """Samples of a step, over all ranks."""
    accumulation: int
    """Micro-batches of a step."""
    rank: int
    ranks: int

    def of(self, samples: Int64[np.ndarray, " batch"]) -> Int64[np.ndarray, "accumulation local"]:
        """Those of this rank in each micro-batch."""
        return samples.reshape(self.accumulation, self.ranks, -1)[:, self.rank]


class StepBatches(NamedTuple):
    """What a rank reads for one step."""

    micro_batches: list[Tensor]
    position: dict[int, Any]
    """Where reading goes on after it, by lane of a stream; an order is its step alone."""


@runtime_checkable
class Batches(Protocol):
    """A set of samples that is read by index."""

    def batch(self, indices: Any) -> Tensor: ...


class BatchOrder:
    """The indices of every step: each epoch visits each example once, in an order of its own.

    Batches may straddle the end of an epoch, so no example is ever dropped.

    Args:
        examples: length of the data set.
        batch: examples of a step, over all ranks.
        seed: epoch e is shuffled by (seed, e) and by nothing else.

    Raises:
        ValueError: there is no example, or the batch is empty.
    """

    def __init__(self, *, examples: int, batch: int, seed: int) -> None:
        if examples < 1 or batch < 1:
            raise ValueError(
                f"BatchOrder: examples {examples} and batch {batch} must be at least 1"
            )
        self.examples = examples
        self.batch = batch
        self.seed = seed
        self._permutations: dict[int, Int64[np.ndarray, " examples"]] = {}

    def indices(self, step: int, *, rank: int = 0, ranks: int = 1) -> Int64[np.ndarray, " local"]:
        """What `rank` of `ranks` reads at `step`: its contiguous share of the global batch.

        Raises:
            ValueError: the ranks don't divide the batch.
        """
        if self.batch % ranks:
            raise ValueError(f"batch {self.batch} is not divisible by {ranks} ranks: change either")
        share = self.batch // ranks
        start = step * self.batch + rank * share
        epochs = range(start // self.examples, (start + share - 1) // self.examples + 1)
        pieces = []
        for epoch in epochs:
            first = epoch * self.examples
            window = slice(max(start - first, 0), start + share - first)
            pieces.append(self._permutation(epoch)[window])
        return np.concatenate(pieces)

    def batches(self, samples: Batches, share: Share, step: int) -> Iterator[StepBatches]:
        """What a rank reads from step on, endlessly."""
        while True:
            parts = share.of(self.indices(step))
            yield StepBatches([samples.batch(part) for part in parts], {})
            step += 1

    def _permutation(self, epoch: int) -> Int64[np.ndarray, " examples"]:
        if epoch not in self._permutations:
            # two are enough for batches that straddle an epoch's end
            while len(self._permutations) > 1:
                del self._permutations[min(self._permutations)]
            entropy = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
            generator = np.random.Generator(np.random.Philox(entropy))
            self._permutations[epoch] = generator.permutation(self.examples)
        return self._permutations[epoch]


def held_out_by_name(names: Sequence[str], share: float) -> list[bool]:
    """Which names are held out: those whose hash falls into the lowest `share` of all hashes.

    For data the names are keys of contents, see `held_out`. A name's side doesn't depend on the
    other names, so a data set may grow without moving training examples into the held-out part.
    Where chance held out none, or all, one name changes sides.
    """
    places = [place_of(name) for name in names]
    lowest, highest = min(places, default=0.0), max(places, default=0.0)
    if lowest == highest:
        return [False] * len(places)
    return [place != highest and (place < share or place == lowest) for place in places]


def place_of(name: str) -> float:
    """A uniform number of [0, 1) that is the same on every machine: held out are those below the
    share."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64
