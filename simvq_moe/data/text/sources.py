"""Documents of a source, cut into lanes that are read side by side and may start anywhere.

With files enough, lane j of n has the files j, j + n, ...; with fewer files than lanes several
lanes share a file by row number. A lane's documents therefore depend on the number of lanes alone.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from simvq_moe.data.rows.base import (
    TEXT_FIELD,
    CorruptDataError,
    Defect,
    Rows,
    UnreachableError,
    missing,
    text_of_value,
)
from simvq_moe.data.rows.saved_sets import own_splits
from simvq_moe.data.text.documents import (
    EMBEDDED,
    WAY_OUT,
    File,
    check_readable,
    content_name,
    list_files,
    read_rows,
)
from simvq_moe.data.text.domains import domain_of
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import printable

BY_CONTENT = "files of text by content"
"""Ends what a digest is made of, because the names of such files decided their sides before."""
HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?"


class Document(NamedTuple):
    """One text."""

    name: str
    """Decides its side; the key of its content."""
    domain: str
    text: str


@runtime_checkable
class Cursor(Protocol):
    """Goes once through a lane's documents."""

    def __iter__(self) -> Iterator[Document | Defect]: ...

    @property
    def position(self) -> Any:
        """Where to go on after what was given, of numbers and strings and containers of them."""
        ...


@runtime_checkable
class Source(Protocol):
    """Documents in any number of lanes."""

    name: str
    digest: str
    """Differs when the files differ."""

    def cursor(self, lane: int, lanes: int, seed: tuple[int, ...], position: Any) -> Cursor:
        """The documents of a lane, files in an order of the seed.

        Args:
            position: where to go on; None: at the start.
        """
        ...


def open_source(source: str, field: str = TEXT_FIELD) -> Source:
    """The files of a folder, or a data set of the Hugging Face hub as NAME or NAME:CONFIG.

    Args:
        field: column or field of rows with the document.

    Raises:
        ConfigError: there is neither.
    """
    source, _ = own_splits(source, None)
    check_stream(source, field)
    return HubDataset(source, field) if _is_hub_name(source) else LocalFiles(source, field)


def check_stream(source: str, field: str = TEXT_FIELD) -> None:
    """Raise `ConfigError` for what is neither a path nor could be a name on the hub, and for files
    none of which has the field."""
    source, _ = own_splits(source, None)
    if not _is_hub_name(source):
        check_readable(source, list_files(source), field)


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0 on, of 63 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_of_files(position: Any, files: list[File]) -> bool:
    return (
        isinstance(position, list | tuple)
        and len(position) == 2
        and all(map(is_count, position))
        and position[0] <= len(files)
    )


def _is_of_shards(position: Any) -> bool:
    """Only `datasets` knows what may be in "shards"; it says so when it reads that."""
    return (
        isinstance(position, Mapping)
        and is_count(position.get("row"))
        and isinstance(position.get("shards"), Mapping)
    )


def _is_hub_name(source: str) -> bool:
    try:
        here = source == EMBEDDED or Path(source).exists()
    except OSError:  # such as a name that is too long: a path that says so when it is listed
        here = True
    return not here and re.fullmatch(HUB_NAME, source) is not None


class LocalFiles:
    """The documents of a file, or of all files of a folder."""

    def __init__(self, source: str, field: str = TEXT_FIELD) -> None:
        self.name, self.field = Path(source).name, field
        self.files = list_files(source)
        try:
            sizes = [(file.name, file.path.stat().st_size) for file in self.files]
        except OSError as error:
            raise ConfigError(f"data.source {UnreachableError(error.filename, error)}") from None
        listed = "".join(f"{name}\0{size}\n" for name, size in sizes)
        if not all(file.has_rows for file in self.files):
            listed += BY_CONTENT
        self.digest = hashlib.sha256(os.fsencode(listed)).hexdigest()

    def cursor(self, lane: int, lanes: int, seed: tuple[int, ...], position: Any) -> FileCursor:
        number = len(self.files)
        if number >= lanes:
            mine, rows = self.files[lane::lanes], Rows(field=self.field)
        else:
            mine = [self.files[lane % number]]
            rows = Rows(0, lane // number, len(range(lane % number, lanes, number)), self.field)
        order = np.random.default_rng([*seed, lane]).permutation(len(mine))
        return FileCursor([mine[i] for i in order], rows, position)


class FileCursor:
    """Goes through files, one after the other."""

    def __init__(self, files: list[File], rows: Rows, position: Any) -> None:
        self.files, self.rows = files, rows
        if position is not None and not _is_of_files(position, files):
            raise CorruptDataError(f"position {position!r} is none of {len(files)} files")
        self.file, self.row = position or (0, 0)

    def __iter__(self) -> Iterator[Document | Defect]:
        while self.file < len(self.files):
            file = self.files[self.file]
            domain = domain_of(file.name, rows=file.has_rows)
            for row, found in read_rows(file.path, self.rows._replace(first=self.row)):
                self.row = row + 1
                if isinstance(found, Defect):
                    yield found
                else:
                    yield Document(content_name(found), domain, found)
            self.file, self.row = self.file + 1, 0

    @property
    def position(self) -> list[int]:
        return [self.file, self.row]


class HubDataset:
    """The training split of a data set on the Hugging Face hub, streamed by `datasets`."""

    field = TEXT_FIELD

    def __init__(self, source: str, field: str = TEXT_FIELD) -> None:
        from datasets import IterableDataset, load_dataset

        name, _, config = source.partition(":")
        self.name = self.digest = source
        self.field = field
        try:
            found = load_dataset(name, config or None, split="train", streaming=True)
            assert isinstance(found, IterableDataset)
            # what the files themselves say, where the hub's card says nothing
            columns = found.column_names or list(next(iter(found), {}))
            if field in columns:
                self.dataset = found.select_columns([field])
        except Exception as error:  # of network, hub, or format: `datasets` has no common class
            reason = printable(" ".join(str(error).split()))
            raise ConfigError(
                f"data.source {source!r} is no path, and as a data set of the Hugging Face hub it "
                f"can't be opened ({reason}): {WAY_OUT}"
            ) from None
        if field not in columns:
            raise ConfigError(
                f"data.source {source!r} has {missing('column', field, columns)}: name one as "
                "data.text_field"
            )

    def cursor(self, lane: int, lanes: int, seed: tuple[int, ...], position: Any) -> HubCursor:
        del seed  # shards stay in their order
        number = max(self.dataset.num_shards, 1)
        if number >= lanes:
            return HubCursor(self, self.dataset.shard(lanes, lane), Rows(), position)
        rows = Rows(0, lane // number, len(range(lane % number, lanes, number)))
        return HubCursor(self, self.dataset.shard(number, lane % number), rows, position)


class HubCursor:
    """Goes through some shards of a data set; `datasets` knows where in them."""

    def __init__(self, source: HubDataset, shards: Any, rows: Rows, position: Any) -> None:
        self.source, self.shards, self.rows = source, shards, rows
        self.row = 0
        if position is not None:
            if not _is_of_shards(position):
                raise CorruptDataError(
                    f"position {position!r} is none of data.source {source.name!r}"
                )
            self.row = position["row"]
            self.shards.load_state_dict(position["shards"])

    def __iter__(self) -> Iterator[Document | Defect]:
        try:
            for content in self.shards:
                row, text = self.row, content[self.source.field]
                self.row += 1
                if row not in self.rows or text is None or text in ("", b""):
                    continue
                where = f"data.source {self.source.name!r} row {row} of a lane"
                found = text_of_value(text, where, self.source.field)
                if isinstance(found, Defect):
                    yield found
                else:
                    yield Document(content_name(found), self.source.name, found)
        except Exception as error:  # a lost connection is no defect that could be skipped
            reason = printable(" ".join(str(error).split()))
            raise CorruptDataError(
                f"data.source {self.source.name!r} after {self.row} rows of a lane: {reason}"
            ) from error

    @property
    def position(self) -> dict[str, Any]:
        return {"row": self.row, "shards": self.shards.state_dict()}
