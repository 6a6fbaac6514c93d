"""Arrays in files that may be anybody's: of the layout that is meant, or refused in one line."""

from __future__ import annotations

import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy_format

from simvq_moe.files.regular import BrokenFileError, open_regular

ARRAY_LIMIT = 2**32
"""Bytes of an array that are read at most: 4 GiB."""
NOT_AN_ARRAY = (
    *(ValueError, EOFError, KeyError, OverflowError, NotImplementedError, RuntimeError),
    *(SyntaxError, tokenize.TokenError, TypeError, zipfile.BadZipFile, zlib.error),
)
"""What numpy and zipfile raise for bytes that are no array."""


class Layout(NamedTuple):
    """What an array has to be."""

    kinds: str
    """numpy's letters of the allowed kinds of dtype: "i" integers, "u" unsigned, "f" floats,
    "b" booleans, "U" strings, "S" bytes."""
    dims: int | None = None
    """Number of its axes; None: any."""
    optional: bool = False
    """Whether an archive may lack it."""


def read_array(
    path: Path,
    layout: Layout,
    *,
    limit: int = ARRAY_LIMIT,
    inside: Path | None = None,
    mapped: bool = False,
) -> np.ndarray:
    """The array of an npy file, never one of Python objects.

    Args:
        limit: bytes that it may have.
        inside: see `read_bytes`.
        mapped: leave it on disk, where pages are read as they are used; `limit` does not count.

    Raises:
        BrokenFileError: it is no array, of another layout, shorter than its header says, or too
            large.
    """
    with open_regular(path, inside=inside) as file:
        try:
            shape, dtype, _ = _header(file)
            start, size = file.tell(), os.fstat(file.fileno()).st_size
        except (*NOT_AN_ARRAY, OSError) as error:
            raise BrokenFileError(path, f"is no array of numpy: {error}") from None
        _check_layout(path, shape, dtype, layout, None if mapped else limit)
        if size != start + prod(shape) * dtype.itemsize:
            raise BrokenFileError(path, "is shorter or longer than its header says")
    try:
        # an empty array can't be mapped
        mode = "r" if mapped and prod(shape) else None
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    except (*NOT_AN_ARRAY, OSError) as error:
        raise BrokenFileError(path, f"is no array of numpy: {error}") from None


def read_arrays(
    path: Path,
    layouts: Mapping[str, Layout],
    *,
    others: Layout | None = None,
    limit: int = ARRAY_LIMIT,
    inside: Path | None = None,
) -> dict[str, np.ndarray]:
    """Arrays of an npz file by name, never such of Python objects.

    Args:
        layouts: the arrays that it must have; others are not read.
        others: what all arrays beside those must be, which then are read as well.
        limit: bytes that all of them may have together, unpacked.
        inside: see `read_bytes`.

    Raises:
        BrokenFileError: it is no such archive, lacks an array, or one has another layout.
    """
    found: dict[str, np.ndarray] = {}
    with _archive(path, inside) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        wanted = dict(layouts)
        if others is not None:
            wanted |= dict.fromkeys(members.keys() - layouts.keys(), others)
        for name, layout in wanted.items():
            if name in members:
                where = f"{path}, array {name},"
                found[name] = _member(archive, members[name], where, layout, limit)
                limit -= found[name].nbytes
            elif not layout.optional:
                raise BrokenFileError(path, f"lacks the array {name}")
    return found


class StoredRows:
    """The rows of an array in an npz file, along its first axis, which are read one at a time: the
    whole may be larger than memory. Look at `shape` before.

    Raises:
        BrokenFileError: it is no such archive, lacks the array, or it has another layout; while
            rows are read: it is shorter than its header says.
    """

    def __init__(self, path: Path, name: str, layout: Layout) -> None:
        self.path, self.name, self.layout = path, name, layout
        with self._opened() as (_, shape, _):
            self.shape = shape

    def __iter__(self) -> Iterator[np.ndarray]:
        with self._opened() as (file, shape, dtype):
            for _ in range(shape[0]):
                row = file.read(prod(shape[1:]) * dtype.itemsize)
                yield np.frombuffer(row, dtype).reshape(shape[1:])

    @contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
        """The file where its rows begin, with shape and dtype of all."""
        with _archive(self.path) as archive, archive.open(f"{self.name}.npy") as packed:
            shape, dtype, by_columns = _header(packed)
            _check_layout(self.path, shape, dtype, self.layout, None)
            if by_columns:
                raise ValueError(f"{self.name} lies by columns")
            yield packed, shape, dtype


@contextmanager
def _archive(path: Path, inside: Path | None = None) -> Iterator[zipfile.ZipFile]:
    """An npz file; what it can't be read for inside is said of it by a `BrokenFileError`."""
    with open_regular(path, inside=inside) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except BrokenFileError:
            raise
        except (*NOT_AN_ARRAY, OSError) as error:
            raise BrokenFileError(path, f"is no archive of numpy arrays: {error}") from None


def _header(file: IO[bytes] | zipfile.ZipExtFile) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Shape and dtype of an npy file, which is left where its values begin, and whether they lie by
    columns."""
    version = npy_format.read_magic(file)
    read = {1: npy_format.read_array_header_1_0, 2: npy_format.read_array_header_2_0}
    if version[0] not in read:
        raise ValueError(f"format version {version[0]}.{version[1]}")
    shape, by_columns, dtype = read[version[0]](file)
    return shape, dtype, by_columns


def _check_layout(
    where: Path | str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    layout: Layout,
    limit: int | None,
) -> None:
    if dtype.kind not in layout.kinds or layout.dims not in (None, len(shape)):
        raise BrokenFileError(
            where,
            f"holds {dtype} of shape {shape}: {layout.dims or 'any'} axes and one of the kinds "
            f"{', '.join(layout.kinds)} are meant",
        )
    if min(shape, default=0) < 0:
        raise BrokenFileError(where, f"has the shape {shape}")
    if limit is not None and prod(shape) * dtype.itemsize > limit:
        raise BrokenFileError(where, f"of shape {shape} has more than {limit:,} bytes")


def _member(
    archive: zipfile.ZipFile, name: str, where: str, layout: Layout, limit: int
) -> np.ndarray:
    with archive.open(name) as packed:
        shape, dtype, _ = _header(packed)
    _check_layout(where, shape, dtype, layout, limit)
    with archive.open(name) as packed:
        return npy_format.read_array(packed, allow_pickle=False)
