"""Ids beyond a vocabulary are found anywhere in a small file, and by samples in a large one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simvq_moe.data import ids
from simvq_moe.data.ids import check_ids
from simvq_moe.files.regular import BrokenFileError


@pytest.mark.parametrize("place", [(0, 0), (4, 1), (9, 2)])
def test_an_id_beyond_the_vocabulary_is_named_with_its_file(
    place: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ids, "BLOCK", 7)
    found = np.zeros((10, 3), dtype=np.uint16)
    check_ids(Path("a.npy"), found, 5)
    found[place] = 4
    check_ids(Path("a.npy"), found, 5)
    with pytest.raises(BrokenFileError, match=r"a\.npy has id 4, beyond the vocabulary of 4"):
        check_ids(Path("a.npy"), found, 4)


def test_of_a_large_file_blocks_from_its_start_to_its_end_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ids, "BLOCK", 2)
    monkeypatch.setattr(ids, "BLOCKS", 3)
    found = np.zeros(100, dtype=np.uint32)
    found[10] = 9
    check_ids(Path("a.npy"), found, 5)
    found[99] = 9
    with pytest.raises(BrokenFileError, match="id 9"):
        check_ids(Path("a.npy"), found, 5)
