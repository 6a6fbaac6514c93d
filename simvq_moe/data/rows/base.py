"""A row of a file of documents: its text, or what is wrong with it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from simvq_moe.files.regular import printable

TEXT_FIELD = "text"
"""Column or field of a row with the document, unless another one is named."""
LARGEST_ROW = 2**26
"""Bytes of a line, a member of an archive, or a value of a column: 64 MiB."""
BUFFER = 2**20
"""Bytes of a parquet file, or of any that is hashed, that are read at a time."""
NAMED = 20
"""Columns that an error names."""


class Defect(NamedTuple):
    """What can't be read."""

    where: str
    """File, and the row in it."""
    reason: str
    of_another_kind: bool = False
    """Whole, but without any text."""

    def __str__(self) -> str:
        return f"{printable(self.where)}: {printable(' '.join(self.reason.split()))}"


class CorruptDataError(ValueError):
    """The data have a defect, and the config says to stop at one."""


class UnreachableError(CorruptDataError):
    """A file can't be read now, whatever is in it; it is never skipped."""

    def __init__(self, where: Path | str, error: OSError) -> None:
        reason = printable(error.strerror or str(error))
        super().__init__(
            f"{printable(str(where))} can't be read now ({reason}): make it readable, it is not "
            "left out because that would change the data"
        )


class Rows(NamedTuple):
    """Which rows of a file are read: from `first` on those of one part of several."""

    first: int = 0
    part: int = 0
    parts: int = 1
    field: str = TEXT_FIELD
    """Column or field with the document."""

    def __contains__(self, row: object) -> bool:
        assert isinstance(row, int)
        return row >= self.first and row % self.parts == self.part


Row = tuple[int, str | Defect]
"""Its number in the file, and its text."""


def defect_of(path: Path, where: str, error: Exception) -> Defect:
    """A defect from what a library says of a file, unless the system says that it can't be
    reached: only then an error has a number."""
    if isinstance(error, OSError) and error.errno is not None:
        raise UnreachableError(path, error) from None
    return Defect(f"{path} {where}", str(error) or type(error).__name__)


def missing(what: str, field: str, there: Collection[str]) -> str:
    """What to say of rows that lack the field."""
    names = ", ".join(printable(str(name)) for name in list(there)[:NAMED])
    return f"no {what} {field!r} among {names or 'none'}"


def text_of_value(value: Any, where: str, field: str) -> str | Defect:
    """A text from a row of others: a string, or bytes of one, of whole characters."""
    if isinstance(value, bytes):
        return decoded(value, where)
    if not isinstance(value, str):
        return Defect(where, f"{field!r} is a {type(value).__name__}, no string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair
        return Defect(where, str(error))
    return value


def decoded(content: bytes, where: str) -> str | Defect:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        return Defect(where, str(error))
