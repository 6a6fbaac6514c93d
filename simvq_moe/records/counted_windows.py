"""The counts of all windows of a run, and how usage.npz has them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format

from simvq_moe.files.arrays import Layout, StoredRows, read_arrays
from simvq_moe.files.regular import BrokenFileError

FASTEST = 1
"""Level of zlib, which leaves a tenth of counts that are small."""


class CountedWindows:
    """Counts of draws, one array (layer, slot) a window, padded with zeros.

    They are compressed in memory, and written and read a window at a time: those of 262,144 codes
    over 1,000 windows would be 2 GiB.

    Args:
        layers: number of counted layers.
        slots: of the layer that has the most.
    """

    def __init__(self, layers: int, slots: int) -> None:
        self.shape = layers, slots
        self.steps: list[int] = []
        """Where each window ends."""
        self._packed: list[bytes] = []

    def add(self, step: int, counts: Sequence[np.ndarray]) -> None:
        """One window more, of the counts of each layer."""
        window = np.zeros(self.shape, dtype="<i8")
        for row, of_layer in zip(window, counts, strict=True):
            row[: len(of_layer)] = of_layer
        self.steps.append(step)
        self._packed.append(zlib.compress(window.data, FASTEST))

    def write(self, archive: zipfile.ZipFile, prefix: str) -> None:
        """Write int64 arrays PREFIXsteps and PREFIXcounts [window, layer, slot], as numpy does."""
        with archive.open(f"{prefix}steps.npy", "w", force_zip64=True) as member:
            npy_format.write_array(member, np.array(self.steps, dtype="<i8"))
        shape = len(self.steps), *self.shape
        header = {"descr": "<i8", "fortran_order": False, "shape": shape}
        with archive.open(f"{prefix}counts.npy", "w", force_zip64=True) as member:
            npy_format.write_array_header_1_0(member, header)
            for window in self._packed:
                member.write(zlib.decompress(window))

    def take_up(self, file: Path, prefix: str, until: int) -> Iterator[tuple[int, np.ndarray]]:
        """Add the windows of a file that end by a step, and give each.

        Raises:
            BrokenFileError: it has no such counts, or those of other layers.
        """
        steps = read_arrays(file, {f"{prefix}steps": Layout("i", 1)})[f"{prefix}steps"]
        windows = StoredRows(file, f"{prefix}counts", Layout("i", 3))
        layers, slots = self.shape
        if windows.shape != (len(steps), layers, slots):
            raise BrokenFileError(
                file,
                f"has counts of shape {windows.shape}, for {len(steps)} steps, {layers} layers "
                f"and {slots} slots",
            )
        for step, window in zip(steps.tolist(), windows, strict=True):
            if step > until:
                return
            self.add(step, list(window))
            yield step, window
