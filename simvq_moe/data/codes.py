"""Token shards: the codes of a data set's samples, and a manifest that says what they stand for.

A folder holds train_00000.npy ..., held_out_00000.npy ... and manifest.json. A row is a sample:
shards are (samples, tokens), or (samples, tokens, levels) for residual quantizers, and are read by
memory map. For a language model a row becomes a sequence: a token that begins it, then its codes,
those of a token's levels one after the other, each level with a range of the vocabulary for itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Int64, UInt
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from simvq_moe.data.hashing import file_sha256
from simvq_moe.data.held_out import PARTS
from simvq_moe.data.ids import check_ids
from simvq_moe.data.order import Indices
from simvq_moe.errors import ConfigError
from simvq_moe.files.arrays import Layout, read_array
from simvq_moe.files.regular import (
    BrokenFileError,
    MissingFileError,
    printable,
    read_json,
    write_json,
    written_whole,
)

MANIFEST = "manifest.json"
FORMAT = "codes of samples 1"
"""Form of the folder; another one is not read."""
BLOCK = 2**20
"""Rows that are counted at a time."""

Count = Annotated[int, Field(ge=0, lt=2**53)]
Size = Annotated[int, Field(ge=1, lt=2**31)]
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=255)]
"""Name of a file in the folder itself."""
LARGEST_VOCABULARY = 2**31
"""The largest vocabulary of a language model of codes."""

Rows = UInt[np.ndarray, "samples tokens *levels"]


class Form(TypedDict):
    """The entry that says what kind of manifest it is."""

    format: str


@dataclass(frozen=True)
class TokenizerReference:
    """The tokenizer whose codes these are."""

    run: Annotated[str, Field(pattern=r"^[^\x00]+$")]
    """Folder of the tokenizer's run, relative to that of the shards."""
    weights_sha256: str
    """SHA-256 of every weight by name."""
    config: Mapping[str, Any]
    """The run's config."""


@dataclass(frozen=True)
class Shard:
    """A finished file."""

    file: FileName
    samples: Count
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What was encoded, and how; equal inputs give shards that are equal to the byte."""

    tokenizer: TokenizerReference
    source: str
    """The source, as data.source has it."""
    data_digest: str
    """Differs when the samples differ."""
    codes: Size
    """Codes of the codebook, or of each level's."""
    grid: tuple[Size, ...]
    """Tokens of a sample along each axis."""
    levels: Size
    """Ids of a token."""
    sample_shape: tuple[Size, ...]
    """Channels, height and width of an image, or samples of a clip."""
    sample_rate: Count
    """Hz of clips; 0: images."""
    samples: Mapping[str, Count]
    """Samples of each part."""
    shard_samples: Size
    """Samples of a shard; the last one of a part may have fewer."""
    whole: bool = False
    """Whether samples are windows that cover whole images or recordings, see `code_items`."""
    shards: Mapping[str, tuple[Shard, ...]] = field(default_factory=dict)
    """Shards of each part, in order; empty until all are written."""

    @property
    def tokens(self) -> int:
        """Tokens of a sample."""
        return prod(self.grid)

    @property
    def context(self) -> int:
        """Codes of a sample, those of all levels."""
        return self.tokens * self.levels

    @property
    def begin(self) -> int:
        """The token that begins a sequence: the last of the vocabulary."""
        return self.codes * self.levels

    @property
    def vocabulary(self) -> int:
        return self.begin + 1

    @property
    def digest(self) -> str:
        """Differs when codes differ."""
        hashes = [shard.sha256 for part in PARTS for shard in self.shards[part]]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (self.tokens,) if self.levels == 1 else (self.tokens, self.levels)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("uint16" if self.codes <= 1 << 16 else "uint32")

    def sequences(self, rows: Rows) -> Int64[Tensor, "samples window"]:
        """The begin token, then the codes: windows of context + 1 tokens."""
        ids = torch.from_numpy(np.asarray(rows).astype(np.int64)).view(-1, self.tokens, self.levels)
        ids = (ids + self._first_of_level).flatten(1)
        return torch.cat([ids.new_full((len(ids), 1), self.begin), ids], 1)

    def ids(
        self, sequences: Int64[Tensor, "samples window"]
    ) -> Int64[Tensor, "samples axis *axes"]:
        """The ids behind `sequences`, in the shape that the tokenizer decodes."""
        ids = sequences[:, 1:].reshape(len(sequences), self.tokens, self.levels)
        ids = ids - self._first_of_level.to(ids.device)
        return ids.view(-1, *self.grid, *self.row_shape[1:])

    @property
    def ranges(self) -> tuple[range, ...]:
        """The vocabulary of each level: code i of a sequence is of level i mod levels."""
        return tuple(range(i * self.codes, (i + 1) * self.codes) for i in range(self.levels))

    @property
    def _first_of_level(self) -> Tensor:
        return torch.arange(self.levels) * self.codes


@dataclass(frozen=True)
class CodeSequences:
    """One part of a folder as sequences, each a sample of its own."""

    manifest: Manifest
    shards: tuple[UInt[np.ndarray, "_ tokens *levels"], ...]
    domains: None = None
    """Domains of the samples are not known."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def context(self) -> int:
        return self.manifest.context

    def rows(self, indices: Indices) -> Rows:
        """The samples named by indices, as they are in the shards."""
        wanted = np.asarray(indices, dtype=np.int64)
        found = np.empty((len(wanted), *self.manifest.row_shape), self.manifest.dtype)
        of = np.searchsorted(self._starts, wanted, side="right") - 1
        for i in np.unique(of):
            found[of == i] = self.shards[i][wanted[of == i] - self._starts[i]]
        return found

    def batch(self, indices: Indices) -> Int64[Tensor, "batch window"]:
        """The sequences named by indices, each of context + 1 tokens."""
        return self.manifest.sequences(self.rows(indices))

    def domains_of(self, indices: Indices) -> None:
        """Nothing is known of where samples come from."""

    def counts(self) -> Int64[np.ndarray, "levels codes"]:
        """How often each code occurs."""
        codes, levels = self.manifest.codes, self.manifest.levels
        total = np.zeros((levels, codes), dtype=np.int64)
        for shard in self.shards:
            for start in range(0, len(shard), BLOCK):
                ids = shard[start : start + BLOCK].reshape(-1, levels)
                total += [np.bincount(column, minlength=codes) for column in ids.T]
        return total

    @cached_property
    def _starts(self) -> Int64[np.ndarray, " shards_and_end"]:
        return np.cumsum([0, *(len(shard) for shard in self.shards)])


def entropy_bits(counts: Int64[np.ndarray, "levels codes"]) -> float:
    """Bits of a code without its context, a mean over levels: what a model that knows the
    frequencies and nothing else needs."""
    shares = counts / counts.sum(1, keepdims=True)
    return float(-(shares * np.log2(np.where(shares > 0, shares, 1.0))).sum(1).mean())


def is_codes(source: str | Path) -> bool:
    """Whether it is a folder of token shards, finished or not."""
    return (_form(Path(source)) or "").startswith("codes of samples")


def read_manifest(folder: Path) -> Manifest:
    """What was encoded into the folder, maybe in part.

    Raises:
        ConfigError: it holds no token shards, in another form, or its manifest can't be true.
    """
    if _form(folder) != FORMAT:
        raise ConfigError(
            f"{folder} holds no {MANIFEST} of token shards that this version reads: give the "
            "folder that `simvq-moe encode` wrote"
        )
    manifest = read_json(folder / MANIFEST, Manifest)
    problem = _contradiction(manifest)
    if problem:
        raise BrokenFileError(folder / MANIFEST, problem)
    return manifest


def _form(folder: Path) -> str | None:
    try:
        return read_json(folder / MANIFEST, Form)["format"]
    except BrokenFileError:
        return None


def _contradiction(manifest: Manifest) -> str | None:
    """Why no folder can have such a manifest; None: one can."""
    if not manifest.grid or max(manifest.context, manifest.vocabulary) > LARGEST_VOCABULARY:
        return f"has {manifest.codes} codes, {manifest.levels} levels and grid {manifest.grid}"
    if set(manifest.samples) != set(PARTS):
        return f"has samples of the parts {', '.join(manifest.samples)}, not {', '.join(PARTS)}"
    if manifest.shards:
        found = {part: sum(s.samples for s in of) for part, of in manifest.shards.items()}
        if found != manifest.samples:
            return f"has shards of {found} samples and says {dict(manifest.samples)}"
    return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace manifest.json whole."""
    content = {"format": FORMAT, **asdict(manifest)}
    write_json(folder / MANIFEST, content)


def write_shard(path: Path, rows: Rows) -> None:
    """The file appears whole or not at all."""
    with written_whole(path) as aside:
        np.save(aside, rows)


def seal(path: Path) -> Shard | None:
    """The file with its hash; None: it is not there, or no shard."""
    try:
        samples = len(read_array(path, Layout("u"), mapped=True))
    except (BrokenFileError, TypeError):  # TypeError: no axes
        return None
    return Shard(path.name, samples, file_sha256(path))


def open_codes(folder: Path) -> dict[str, CodeSequences]:
    """Both parts of a finished folder, by memory map.

    Raises:
        ConfigError: it is unfinished, or a shard is missing or of another shape.
    """
    manifest = read_manifest(folder)
    if not manifest.shards:
        raise ConfigError(f"{folder} is not encoded to its end: run the same encode command again")
    return {
        part: CodeSequences(
            manifest, tuple(_open(folder, manifest, shard) for shard in manifest.shards[part])
        )
        for part in PARTS
    }


def _open(folder: Path, manifest: Manifest, shard: Shard) -> Rows:
    shape, path = (shard.samples, *manifest.row_shape), folder / shard.file
    again = "run the same encode command again"
    try:
        rows = read_array(path, Layout("u", len(shape)), mapped=True)
        if rows.shape != shape or rows.dtype != manifest.dtype:
            raise BrokenFileError(path, f"holds {rows.dtype} of shape {rows.shape}")
        check_ids(path, rows, manifest.codes)
    except MissingFileError:
        raise ConfigError(f"{printable(str(path))} is missing: {again}") from None
    except BrokenFileError as error:
        raise ConfigError(f"{error}, not {manifest.dtype} of shape {shape}: {again}") from None
    return rows
