"""Counts of windows take little memory, and are read as they were written."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from simvq_moe.files.regular import BrokenFileError
from simvq_moe.records.counted_windows import CountedWindows

LAYERS, SLOTS, WINDOWS = 2, 16_384, 100
WHOLE = 8 * LAYERS * SLOTS * WINDOWS


def counts_of(step: int) -> list[np.ndarray]:
    """Of two layers, the second of which has fewer slots."""
    random = np.random.default_rng(step)
    return [random.poisson(2, SLOTS), random.poisson(2, SLOTS // 2)]


def filled() -> CountedWindows:
    windows = CountedWindows(LAYERS, SLOTS)
    for step in range(1, WINDOWS + 1):
        windows.add(10 * step, counts_of(step))
    return windows


def write(windows: CountedWindows, file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        windows.write(archive, "")


def test_they_are_kept_written_and_taken_up_in_a_fifth_of_their_memory(tmp_path: Path) -> None:
    file = tmp_path / "usage.npz"
    tracemalloc.start()
    try:
        write(filled(), file)
        again = CountedWindows(LAYERS, SLOTS)
        taken = sum(window.sum() for _, window in again.take_up(file, "", 10 * WINDOWS))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < WHOLE / 5
    with np.load(file) as saved:
        assert saved["steps"].tolist() == again.steps == list(range(10, 10 * WINDOWS + 1, 10))
        assert saved["counts"].dtype == np.int64
        assert saved["counts"].sum() == taken
        for step, window in enumerate(saved["counts"], start=1):
            first, second = counts_of(step)
            np.testing.assert_array_equal(window[0], first)
            np.testing.assert_array_equal(window[1], np.pad(second, (0, SLOTS - len(second))))


def test_only_windows_up_to_a_step_are_taken_up_and_written_again_alike(tmp_path: Path) -> None:
    write(filled(), tmp_path / "whole.npz")
    part = CountedWindows(LAYERS, SLOTS)
    assert [step for step, _ in part.take_up(tmp_path / "whole.npz", "", 25)] == [10, 20]
    for step in range(3, WINDOWS + 1):
        part.add(10 * step, counts_of(step))
    write(part, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"steps": np.arange(2)}, "counts.npy"),
        ({"steps": np.arange(2), "counts": np.ones((2, 3, 4), dtype=np.int64)}, "for 2 steps, 1"),
        ({"steps": np.arange(3), "counts": np.ones((2, 1, 4), dtype=np.int64)}, "for 3 steps, 1"),
        ({"steps": np.arange(2), "counts": np.ones((2, 1, 4))}, "float64"),
        ({"steps": np.arange(2), "counts": np.ones((4, 1, 2), dtype=np.int64).T}, "by columns"),
    ],
)
def test_what_is_no_file_of_these_layers_is_refused(
    arrays: dict[str, np.ndarray], words: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "usage.npz", **arrays)  # pyright: ignore[reportArgumentType]
    with pytest.raises(BrokenFileError, match=words):
        list(CountedWindows(1, 4).take_up(tmp_path / "usage.npz", "", 9))


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "usage.npz"
    write(filled(), file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(BrokenFileError, match="archive"):
        list(CountedWindows(LAYERS, SLOTS).take_up(file, "", 99))
