"""Documents of local files: texts, and rows of JSON lines, parquet and tar (webdataset) files.

Every reader goes through a file in order and may start at any row. What can't be read comes out as
a `Defect` in its place: after a broken row the file goes on, after a broken file it ends.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from tarfile import EOFHeaderError, HeaderError, ReadError  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any, Literal, NamedTuple

from simvq_moe.merging import ConfigError

PROSE = frozenset([".txt", ".md", ".rst", ".tex", ".html"])
CODE = frozenset(
    [".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts"]
)
TEXT_SUFFIXES = PROSE | CODE
"""Files that are one document each."""
TEXT_FIELD = "text"
"""Column or field of a row with the document."""
NO_LIBRARY = frozenset(["site-packages", "dist-packages", "__pycache__"])
TESTS = frozenset(["test", "tests", "idle_test"])
GENERATED_TABLES = frozenset(["encodings", "pydoc_data"])
STDLIB_WITHOUT = NO_LIBRARY | TESTS | GENERATED_TABLES
"""Folders of the standard library that "python-stdlib" leaves out."""
ROWS_AT_A_TIME = 1024
"""Of a parquet file."""
WAY_OUT = (
    "give a folder or file of text (.txt, .md, .py, ...), .jsonl, .parquet or .tar (field 'text'), "
    "or 'python-stdlib'"
)

OnCorrupt = Literal["stop", "skip"]

log = logging.getLogger(__name__)


class File(NamedTuple):
    """A file that may hold documents."""

    path: Path
    name: str
    """The path inside the source: the same on every machine."""

    @property
    def has_rows(self) -> bool:
        return reader_of(self.path) is not None


class Defect(NamedTuple):
    """What can't be read."""

    where: str
    """File, and the row in it."""
    reason: str
    of_another_kind: bool = False
    """Whole, but without any text."""

    def __str__(self) -> str:
        return f"{self.where}: {' '.join(self.reason.split())}"


class CorruptDataError(ValueError):
    """The data have a defect, and the config says to stop at one."""


class Rows(NamedTuple):
    """Which rows of a file are read: from `first` on those of one part of several."""

    first: int = 0
    part: int = 0
    parts: int = 1

    def __contains__(self, row: object) -> bool:
        assert isinstance(row, int)
        return row >= self.first and row % self.parts == self.part


Row = tuple[int, str | Defect]
"""Its number in the file, and its text."""


class Defects:
    """What happens at a defect: the run stops, or the log names and counts it once."""

    def __init__(self, on_corrupt: OnCorrupt) -> None:
        self.on_corrupt = on_corrupt
        self.skipped: set[str] = set()

    def meet(self, defect: Defect) -> None:
        """Go on after a defect.

        Raises:
            CorruptDataError: defects aren't to be skipped.
        """
        if self.on_corrupt == "stop":
            raise CorruptDataError(f"{defect}: repair it, or set data.on_corrupt to skip")
        if defect.where not in self.skipped:
            self.skipped.add(defect.where)
            log.warning("skipped %s (%d skipped by this process)", defect, len(self.skipped))


def list_files(source: str) -> list[File]:
    """Every file that may hold documents (an empty one can't), in order of its name.

    Raises:
        ConfigError: the source doesn't exist.
    """
    stdlib = source == "python-stdlib"
    root = Path(sysconfig.get_path("stdlib") if stdlib else source)
    if root.is_file():
        return [File(root, root.name)]
    if not root.is_dir():
        raise ConfigError(f"data.source {source!r} does not exist: {WAY_OUT}")
    left_out = STDLIB_WITHOUT if stdlib else frozenset[str]()
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in left_out and not s.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        paths = [path for path in paths if _may_hold_documents(path, stdlib)]
        found += [path for path in paths if path.is_file() and path.stat().st_size]
    return sorted(
        (File(path, path.relative_to(root).as_posix()) for path in found),
        key=lambda file: file.name,
    )


def _may_hold_documents(path: Path, stdlib: bool) -> bool:
    if stdlib:
        return path.suffix == ".py"
    return path.suffix.lower() in TEXT_SUFFIXES or reader_of(path) is not None


def first_defect(path: Path) -> Defect | None:
    """What is wrong at the start of a file: no UTF-8, no row with a text, a broken first row."""
    reader = reader_of(path)
    if reader is not None:
        nothing = Defect(str(path), f"no row with a {TEXT_FIELD!r}", of_another_kind=True)
        _, found = next(reader(path, Rows()), (0, nothing))
        return found if isinstance(found, Defect) else None
    try:
        with path.open(encoding="utf-8") as file:
            file.read(4096)
    except (OSError, ValueError) as error:
        return Defect(str(path), str(error), of_another_kind=True)
    return None


def name_of(file: File, text: str) -> str:
    """The name that decides a document's side: the file's, or for a row that of its content."""
    return content_name(text) if file.has_rows else file.name


def content_name(text: str) -> str:
    """The name of a document that is known by its content alone."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_rows(path: Path, rows: Rows) -> Iterator[Row]:
    """The texts of a file's rows; a file of text is one row. Rows without a text are left out."""
    yield from (reader_of(path) or _read_text)(path, rows)


def reader_of(path: Path) -> Callable[[Path, Rows], Iterator[Row]] | None:
    """The reader of a file with rows; None: it is one document."""
    name = path.name.lower()
    return next((reader for suffix, reader in READERS.items() if name.endswith(suffix)), None)


def _read_text(path: Path, rows: Rows) -> Iterator[Row]:
    if 0 not in rows:
        return
    try:
        yield 0, path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        yield 0, Defect(str(path), str(error))


def _read_json_lines(path: Path, rows: Rows) -> Iterator[Row]:
    line = -1
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for line, content in enumerate(file):
                if line in rows and content.strip():
                    yield from _with_text(line, content, f"{path} line {line + 1}")
    except (OSError, EOFError, zlib.error) as error:
        yield line + 1, Defect(f"{path} from line {line + 2} on", str(error))


def _read_parquet(path: Path, rows: Rows) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    row = 0
    try:
        with ParquetFile(path) as file:
            if TEXT_FIELD not in file.schema_arrow.names:
                yield 0, Defect(str(path), f"no column {TEXT_FIELD!r}", of_another_kind=True)
                return
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if row + size <= rows.first:
                    row += size
                    continue
                for batch in file.iter_batches(ROWS_AT_A_TIME, [group], [TEXT_FIELD]):
                    for text in batch.column(0):
                        if row in rows and text.as_py():
                            yield row, text.as_py()
                        row += 1
    except (ArrowException, OSError) as error:
        yield row, Defect(f"{path} from row {row} on", str(error))


def _read_tar(path: Path, rows: Rows) -> Iterator[Row]:
    """Members .txt, and .json with a text."""
    number = 0
    try:
        with tarfile.open(path, "r|*", tarinfo=_Header) as archive:
            for number, member in enumerate(archive):
                suffix = Path(member.name).suffix.lower()
                if number not in rows or not member.isfile() or suffix not in (".txt", ".json"):
                    continue
                opened = archive.extractfile(member)
                assert opened is not None
                content, where = opened.read(), f"{path} member {member.name}"
                if suffix == ".json":
                    yield from _with_text(number, content, where)
                elif content:
                    yield number, _decoded(content, where)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        yield number, Defect(f"{path} from member {number} on", str(error))


class _Header(tarfile.TarInfo):
    """Of a member; `tarfile` takes a broken one, and a missing one, for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            raise ReadError(f"no end of the archive, {error}") from error


def _with_text(row: int, content: bytes, where: str) -> Iterator[Row]:
    """The text of a JSON object; nothing if it is empty."""
    try:
        text: Any = json.loads(content)[TEXT_FIELD]
        if isinstance(text, str):
            text.encode()  # JSON may hold half of a surrogate pair
    except (LookupError, TypeError):
        yield row, Defect(where, f"no field {TEXT_FIELD!r}", of_another_kind=True)
        return
    except ValueError as error:
        yield row, Defect(where, str(error))
        return
    if isinstance(text, str) and text:
        yield row, text


def _decoded(content: bytes, where: str) -> str | Defect:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        return Defect(where, str(error))


READERS: dict[str, Callable[[Path, Rows], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".json.gz": _read_json_lines,
    ".parquet": _read_parquet,
    ".tar": _read_tar,
    ".tar.gz": _read_tar,
}
"""By the end of a file's name."""
