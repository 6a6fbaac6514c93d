"""Token ids of text in memory-mapped files, read in windows by index.

A folder of token files has a manifest.json with at least `vocabulary`, the tokenizer.json, and 1-D
.npy files of unsigned ids whose names start with "train" and with "held_out". The folders that
`data.text` makes of a corpus are such folders.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import torch
from jaxtyping import Int64, Integer, UInt
from pydantic import Field
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from simvq_moe.data.held_out import PARTS, file_key
from simvq_moe.data.ids import check_ids
from simvq_moe.data.order import Indices
from simvq_moe.data.rows.base import CorruptDataError
from simvq_moe.data.text.domains import Domains, load_domains
from simvq_moe.data.text.tokenizer import (
    TOKENIZER_FILE,
    bytes_of_token,
    encode_texts,
    open_tokenizer,
)
from simvq_moe.errors import ConfigError
from simvq_moe.files.arrays import Layout, read_array
from simvq_moe.files.regular import BrokenFileError, printable, read_json

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Size = Annotated[int, Field(ge=1, le=2**31)]
MANIFEST = "manifest.json"
DOMAINS = "held_out_domains.npz"


class PartContent(TypedDict, total=False):
    """What a manifest says of a part; a folder that others wrote may say nothing."""

    documents: Annotated[int, Field(ge=0)]
    tokens: Annotated[int, Field(ge=0)]


class ManifestContent(TypedDict):
    """What is read of manifest.json."""

    vocabulary: Size
    end_of_text: NotRequired[TokenId]
    train: NotRequired[PartContent]
    held_out: NotRequired[PartContent]


@dataclass(frozen=True)
class TokenWindows:
    """A row of token ids, cut into windows that overlap by one token.

    Window i holds the tokens from i * context to (i + 1) * context inclusive: the last one is only
    a target there and the first input of the next, so every token but the first is a target once.
    """

    tokens: UInt[np.ndarray, " tokens"]
    context: int
    domains: Domains | None = None
    """Domains of the documents; None: not known."""
    vocabulary: int | None = None
    """Ids are held against it when they are read; None: they are known to fit."""

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.context

    def batch(self, indices: Indices) -> Int64[Tensor, "batch window"]:
        """The windows named by indices, each of context + 1 tokens."""
        starts = np.asarray(indices)[:, None] * self.context
        found = self.tokens[starts + np.arange(self.context + 1)].astype(np.int64)
        if self.vocabulary is not None and found.size and found.max() >= self.vocabulary:
            raise CorruptDataError(
                f"token files have id {found.max()}, beyond the vocabulary of {self.vocabulary}: "
                "write them again"
            )
        return torch.from_numpy(found)

    def domains_of(self, indices: Indices) -> Int64[np.ndarray, "batch context"] | None:
        """Domains of the windows' inputs, numbers of `domains.names`."""
        if self.domains is None:
            return None
        starts = np.asarray(indices)[:, None] * self.context
        return self.domains.of_tokens(self.tokens, starts + np.arange(self.context))


class TokenShards:
    """Several files as one set of windows, none of which straddles two files."""

    def __init__(self, shards: Sequence[TokenWindows]) -> None:
        self.shards = tuple(shards)
        self.firsts = np.cumsum([0, *(len(shard) for shard in shards)])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def batch(self, indices: Indices) -> Int64[Tensor, "batch window"]:
        """The windows named by indices, in the order of the files."""
        numbers = np.asarray(indices)
        of = np.searchsorted(self.firsts, numbers, side="right") - 1
        pairs = zip(of, numbers - self.firsts[of], strict=True)
        return torch.cat([self.shards[shard].batch(np.array([i])) for shard, i in pairs])


@dataclass(frozen=True)
class Corpus:
    """Both sides of a corpus and what its tokens stand for."""

    train: TokenWindows | TokenShards | None
    """None: it is a stream."""
    held_out: TokenWindows
    digest: str
    """Differs when tokens differ."""
    end_of_text: int
    """The token that ends a document."""
    tokenizer: Path
    """A tokenizer.json that `tokenizers` and `transformers` load."""
    bytes_of_token: Int64[Tensor, " vocabulary"]
    """UTF-8 bytes that each id stands for, 0 for the end of text: the unit of bits per byte."""

    def decode(self, ids: Integer[Tensor, " tokens"] | Integer[np.ndarray, " tokens"]) -> str:
        """The text of the ids, with the ends of documents left out."""
        return open_tokenizer(self.tokenizer).decode(np.asarray(ids).tolist())


def is_token_folder(source: str) -> bool:
    """Whether a source is a folder of token files."""
    return all((Path(source) / name).is_file() for name in (MANIFEST, TOKENIZER_FILE))


def load_tokens(
    folder: Path,
    parts: Sequence[str] = PARTS,
    *,
    source: str,
    vocabulary: int,
    context: int,
) -> Corpus:
    """A folder of token files, mapped into memory.

    Args:
        parts: those that it has to have.
        source: what the user calls them.
        vocabulary: tokens of the model's vocabulary, no less than the folder's.
        context: tokens of a window, less the one that is only a target.

    Raises:
        ConfigError: a part of it is missing, or it goes with neither vocabulary nor context.
    """
    manifest = read_json(folder / MANIFEST, ManifestContent)
    largest = manifest["vocabulary"]
    if largest > vocabulary:
        raise ConfigError(
            f"data.vocabulary {vocabulary} < {largest}, that of {folder / MANIFEST}: set it so"
        )
    end = manifest.get("end_of_text", 0)
    if end >= largest:
        raise BrokenFileError(
            folder / MANIFEST, f"has end_of_text {end}, beyond its vocabulary of {largest}"
        )
    shards = {
        part: _load_part(folder, part, source, context, largest, manifest.get(part, {}))
        for part in parts
    }
    held_out, train = shards["held_out"], shards.get("train", [])
    tokens = held_out[0].tokens
    if len(held_out) > 1:
        tokens = np.concatenate([shard.tokens for shard in held_out])
    tokenizer = folder / TOKENIZER_FILE
    return Corpus(
        train=(train[0] if len(train) == 1 else TokenShards(train)) if train else None,
        held_out=TokenWindows(tokens, context, _domains(folder / DOMAINS, tokens, end), largest),
        digest=_digest(folder, parts),
        end_of_text=end,
        tokenizer=tokenizer,
        bytes_of_token=bytes_of_token(tokenizer, vocabulary),
    )


def _digest(folder: Path, parts: Sequence[str]) -> str:
    """A digest of everything that is read of the folder; of large files a part."""
    files = [file for part in parts for file in sorted(folder.glob(f"{part}*.npy"))]
    files = [folder / MANIFEST, folder / TOKENIZER_FILE, *files]
    keys = "".join(f"{file.name} {file_key(file)}\n" for file in files)
    return hashlib.sha256(os.fsencode(keys)).hexdigest()[:16]


def _domains(path: Path, tokens: UInt[np.ndarray, " tokens"], end: int) -> Domains | None:
    """Domains of every document of the tokens; None: not known."""
    if not path.exists():
        return None
    domains = load_domains(path)
    documents = int((tokens == end).sum()) + int(tokens[-1] != end)
    if domains.end_of_text != end or len(domains.of_document) < documents:
        raise BrokenFileError(
            path,
            f"knows {len(domains.of_document)} documents that end with token "
            f"{domains.end_of_text}: there are {documents} that end with {end}",
        )
    return domains


def _load_part(
    folder: Path, part: str, source: str, context: int, vocabulary: int, said: PartContent
) -> list[TokenWindows]:
    files = sorted(folder.glob(f"{part}*.npy"))
    try:
        arrays = [read_array(file, Layout("u", 1), mapped=True) for file in files]
        for file, tokens in zip(files, arrays, strict=True):
            check_ids(file, tokens, vocabulary)
    except BrokenFileError as error:
        raise ConfigError(
            f"data.source: {error.path} can't be read ({printable(error.reason)}): write it again"
        ) from None
    shards = [TokenWindows(tokens, context, None, vocabulary) for tokens in arrays]
    number = sum(len(tokens) for tokens in arrays)
    if not sum(len(shard) for shard in shards):
        raise ConfigError(
            f"data.context {context}: data.source {source!r} has only {number} {part} tokens in "
            f"{len(shards)} files: lower it or give more text"
        )
    # shards may share a token each
    if len(files) == 1 and said.get("tokens", number) != number:
        raise ConfigError(
            f"data.source: {files[0]} has {number} tokens, {folder / MANIFEST} says "
            f"{said.get('tokens')}: write it again"
        )
    return shards


def encode(tokenizer: Tokenizer, texts: list[str], end: int) -> list[list[int]]:
    """The ids of documents, each with the end, which is nowhere else."""
    return [[*ids, end] for ids in encode_texts(tokenizer, texts)]


def write_tokens(documents: Dataset, tokenizer: Tokenizer, end: int, path: Path) -> int:
    """Encode the documents' column "text" into one .npy file; returns the number of tokens."""
    from datasets import Features, List, Value

    dtype = "uint16" if max(tokenizer.get_vocab().values()) < 1 << 16 else "uint32"

    def encoded(batch: Mapping[str, list[str]]) -> dict[str, list]:
        ids = encode(tokenizer, batch["text"], end)
        return {"ids": ids, "length": [len(document) for document in ids]}

    aside = path.with_name(f"{path.name}.arrow")
    ids_of = documents.map(
        encoded,
        batched=True,
        batch_size=32,
        remove_columns=documents.column_names,
        features=Features({"ids": List(Value(dtype)), "length": Value("int64")}),
        load_from_cache_file=False,
        # nobody asks for it, and otherwise the function would be hashed, with all that it refers to
        new_fingerprint=path.name,
        # for data sets in memory it would be a folder in that for temporary files
        cache_file_name=str(aside),
    ).with_format("numpy")
    total = int(sum(batch["length"].sum() for batch in batches(ids_of, 4096)))
    tokens = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(total,))
    end_of_written = 0
    for batch in batches(ids_of, 64):
        for ids in batch["ids"]:
            tokens[end_of_written : end_of_written + len(ids)] = ids
            end_of_written += len(ids)
    tokens.flush()
    aside.unlink()
    return total


def batches(dataset: Dataset, size: int) -> Iterator[dict[str, Any]]:
    """The rows of a data set, so many at a time."""
    return cast("Iterator[dict[str, Any]]", dataset.iter(batch_size=size))
