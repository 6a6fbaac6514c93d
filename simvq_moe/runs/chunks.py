"""The tensors of a checkpoint: files of chunks, and an index that says where each chunk lies.

Every rank writes one file of weights and one of moments, in safetensors, whose entries KEY@START
are pieces of flattened tensors, chunks of at most `LARGEST_CHUNK` elements. A chunk's digest is
taken while it is written, and compared by whoever reads it: nobody reads a file to see that it is
whole. The folder may be anybody's: the index is validated before anything is read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Annotated, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from simvq_moe.files.regular import BrokenFileError, open_regular
from simvq_moe.files.tensors import DTYPES, NAMES, bytes_of, framed_header

INDEX = "index.json"
LARGEST_CHUNK = 2**24
"""Elements, 64 MiB of float32: what is read at least, and what is copied from a GPU at once."""
Count = Annotated[int, Field(ge=0, le=2**53)]


class Chunk(NamedTuple):
    """Consecutive elements of a flattened tensor, and where they lie."""

    start: Count
    length: Count
    """Number of elements."""
    file: Annotated[str, Field(pattern=r"^(model|optimizer)_[0-9]{1,9}\.safetensors$")]
    offset: Count
    """Place of the first byte in the file."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Stored(BaseModel):
    """One tensor of a checkpoint."""

    model_config = ConfigDict(frozen=True)
    dtype: str
    shape: tuple[Count, ...]
    chunks: tuple[Chunk, ...]

    @property
    def elements(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @model_validator(mode="after")
    def _check(self) -> Stored:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        at, size = 0, 1
        for chunk in sorted(self.chunks):
            if chunk.start != at:
                raise ValueError(f"chunks leave out or repeat element {min(at, chunk.start)}")
            at += chunk.length
        for length in self.shape:
            size *= length
        if at != size:
            raise ValueError(f"chunks have {at} of {size} elements")
        return self


class Index(BaseModel):
    """Every tensor of a checkpoint, by key: the name in the state dict, or MOMENT/NAME."""

    model_config = ConfigDict(frozen=True)
    tensors: dict[str, Stored]

    def weights(self) -> dict[str, Stored]:
        """The state dict's alone."""
        return {key: stored for key, stored in self.tensors.items() if file_kind(key) == "model"}


class ChunkToWrite(NamedTuple):
    """A chunk before it has a place in a file."""

    key: str
    start: int
    length: int
    dtype: torch.dtype
    data: Callable[[], Tensor]
    """The elements, on any device."""


def file_kind(key: str) -> str:
    """What files a tensor goes to: their name before the rank."""
    return "optimizer" if "/" in key else "model"


def write_chunks(path: Path, chunks: Sequence[ChunkToWrite]) -> list[Chunk]:
    """Write a safetensors file, a chunk at a time; where each has come to lie."""
    header, end = {}, 0
    for chunk in chunks:
        begin, end = end, end + chunk.length * chunk.dtype.itemsize
        header[f"{chunk.key}@{chunk.start}"] = {
            "dtype": NAMES[chunk.dtype],
            "shape": [chunk.length],
            "data_offsets": [begin, end],
        }
    written = []
    with path.open("wb") as file:
        file.write(framed_header(header))
        for chunk in chunks:
            content = bytes_of(chunk.data())
            digest = hashlib.sha256(content).hexdigest()
            at = file.tell()
            file.write(content)
            written.append(Chunk(chunk.start, chunk.length, path.name, at, digest))
    return written


class ChunkReader:
    """Reads chunks of a checkpoint's folder; files stay open until it is closed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, IO[bytes]] = {}
        self.stack = ExitStack()

    def __enter__(self) -> ChunkReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def read(self, chunk: Chunk, into: Tensor) -> None:
        """Read the elements of a chunk into a tensor of its dtype and length on the CPU.

        Raises:
            BrokenFileError: they are not those that were written.
        """
        path, file = self.folder / chunk.file, self._open(chunk)
        content = into.view(torch.uint8).numpy().data  # where it lies, never a copy
        try:
            file.seek(chunk.offset)
            file.readinto(content)  # pyright: ignore[reportAttributeAccessIssue]
        except OSError as error:
            raise BrokenFileError(path, f"can't be read: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != chunk.sha256:
            raise BrokenFileError(path, "has another content than when it was written")

    def check_room(self, chunk: Chunk, dtype: torch.dtype) -> None:
        """Raise `BrokenFileError` unless the file is long enough, before memory is taken."""
        end = chunk.offset + chunk.length * dtype.itemsize
        if end > os.fstat(self._open(chunk).fileno()).st_size:
            raise BrokenFileError(self.folder / chunk.file, "is shorter than when it was written")

    def _open(self, chunk: Chunk) -> IO[bytes]:
        if chunk.file not in self.files:
            file = open_regular(self.folder / chunk.file, inside=self.folder)
            self.files[chunk.file] = self.stack.enter_context(file)
        return self.files[chunk.file]


def read_whole(folder: Path, tensors: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors, one after the other.

    Raises:
        BrokenFileError: see `ChunkReader.read`.
    """
    with ChunkReader(folder) as reader:
        for key, stored in tensors.items():
            dtype = DTYPES[stored.dtype]
            for chunk in stored.chunks:
                reader.check_room(chunk, dtype)
            flat = torch.empty(stored.elements, dtype=dtype)
            for chunk in stored.chunks:
                reader.read(chunk, flat[chunk.start : chunk.start + chunk.length])
            yield key, flat.view(stored.shape)
