"""Ids in files of others are checked before a model looks them up: one beyond its vocabulary would
end a run far from its cause, on a GPU without a word of where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import UInt

from simvq_moe.files.regular import BrokenFileError

BLOCK = 2**20
"""Ids that are looked at together."""
BLOCKS = 256
"""Blocks of a large file that are looked at, at even distances; a small one has fewer."""


def check_ids(path: Path, ids: UInt[np.ndarray, "*axes"], vocabulary: int) -> None:
    """Look at all ids of an array, or of a large one at some that lie all over it.

    Raises:
        BrokenFileError: one is beyond the vocabulary.
    """
    if np.iinfo(ids.dtype).max < vocabulary or not ids.size:
        return
    flat = ids.reshape(-1)
    starts = range(0, len(flat), BLOCK)
    if len(starts) > BLOCKS:
        starts = np.linspace(0, len(flat) - BLOCK, BLOCKS).astype(int)
    largest = max(int(flat[start : start + BLOCK].max()) for start in starts)
    if largest >= vocabulary:
        raise BrokenFileError(path, f"has id {largest}, beyond the vocabulary of {vocabulary}")
