"""Documents of local files: texts, and rows of JSON lines, parquet and tar (webdataset) files.

Every reader goes through a file in order and may start at any row. What can't be read comes out as
a `Defect` in its place: after a broken row the file goes on, after a broken file it ends. No reader
holds more than a row of `LARGEST_ROW` bytes, or a document of `LARGEST_TEXT`, whatever a file
unpacks to. A file that can't be reached now (no permission, an error of the disk or the network)
has no defect: to leave it out would change the data unnoticed, so it is an `UnreachableError`.

Of a folder all subfolders are searched. Links to files are read wherever they lead, as data sets
often are folders of such links; links to folders are not followed (they may lead in a circle, or
give files twice), which the log says.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import stat
import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from tarfile import EOFHeaderError, HeaderError, ReadError  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any, Literal, NamedTuple, NoReturn

from simvq_moe.data.held_out import content_key
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import is_told, printable

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
LARGEST_ROW = 2**26
"""Bytes of a line, a member of an archive, or a value of a parquet file: 64 MiB."""
LARGEST_TEXT = 2**30
"""Bytes of a file that is one document: 1 GiB."""
LARGEST_HEADER = 2**20
"""Bytes of a member's long name or other attributes: 1 MiB."""
BUFFER = 2**20
"""Bytes of a parquet file, or of any that is hashed, that are read at a time."""
EMBEDDED = "python-stdlib"
"""The source that every machine has."""
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
            if is_told(len(self.skipped)):
                log.warning("skipped %s (%d skipped by this process)", defect, len(self.skipped))


def list_files(source: str) -> list[File]:
    """Every file that may hold documents (an empty one can't), in order of its name.

    Raises:
        ConfigError: the source doesn't exist, or a part of it can't be read now.
    """
    embedded = source == EMBEDDED
    root = Path(sysconfig.get_path("stdlib") if embedded else source)
    try:
        mode = root.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte
        raise ConfigError(f"data.source {source!r} does not exist: {WAY_OUT}") from None
    except OSError as error:
        raise ConfigError(f"data.source {UnreachableError(repr(source), error)}") from None
    if stat.S_ISREG(mode):
        return [File(root, root.name)]
    if not stat.S_ISDIR(mode):
        raise ConfigError(f"data.source {source!r} is no file or folder: {WAY_OUT}")
    try:
        return sorted(_files_in(root, embedded), key=lambda file: file.name)
    except OSError as error:
        reason = UnreachableError(error.filename, error)
        raise ConfigError(f"data.source {source!r}: {reason}") from None


def _files_in(root: Path, embedded: bool) -> Iterator[File]:
    left_out = STDLIB_WITHOUT if embedded else frozenset[str]()
    not_followed = []
    for folder, subfolders, names in os.walk(root, onerror=_unreachable):
        subfolders[:] = [s for s in subfolders if s not in left_out and not s.startswith(".")]
        not_followed += [s for s in subfolders if Path(folder, s).is_symlink()]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if not _may_hold_documents(path, embedded):
                continue
            status = path.stat()
            if stat.S_ISREG(status.st_mode) and status.st_size:
                yield File(path, path.relative_to(root).as_posix())
    if not_followed:
        shown = map(printable, sorted(not_followed)[:5])
        some = ", ".join(shown) + (", ..." if not_followed[5:] else "")
        log.warning("%s: did not follow %d links to folders: %s", root, len(not_followed), some)


def _unreachable(error: OSError) -> NoReturn:
    raise error


def _may_hold_documents(path: Path, embedded: bool) -> bool:
    if embedded:
        return path.suffix == ".py"
    return path.suffix.lower() in TEXT_SUFFIXES or reader_of(path) is not None


def first_defect(path: Path) -> Defect | None:
    """What is wrong before the first text of a file: no UTF-8, no row with a text at all, or a
    broken row. Rows of another kind before it don't decide what the file is.

    Raises:
        UnreachableError: it can't be read now.
    """
    reader = reader_of(path)
    if reader is not None:
        for _, found in reader(path, Rows()):
            if not isinstance(found, Defect):
                return None
            if not found.of_another_kind:
                return found
        return Defect(str(path), f"no row with a {TEXT_FIELD!r}", of_another_kind=True)
    try:
        with path.open(encoding="utf-8") as file:
            file.read(4096)
    except OSError as error:
        raise UnreachableError(path, error) from None
    except ValueError as error:
        return Defect(str(path), str(error), of_another_kind=True)
    return None


def content_name(text: str) -> str:
    """The name of a document by its content, which decides its side."""
    return content_key(text.encode())


def read_rows(path: Path, rows: Rows) -> Iterator[Row]:
    """The texts of a file's rows; a file of text is one row. Rows without a text are left out.

    Raises:
        UnreachableError: it can't be read now.
    """
    yield from (reader_of(path) or _read_text)(path, rows)


def reader_of(path: Path) -> Callable[[Path, Rows], Iterator[Row]] | None:
    """The reader of a file with rows; None: it is one document."""
    name = path.name.lower()
    return next((reader for suffix, reader in READERS.items() if name.endswith(suffix)), None)


def _defect(path: Path, where: str, error: Exception) -> Defect:
    """Of what a library says of a file, unless the system says that it can't be reached: only then
    an error has a number."""
    if isinstance(error, OSError) and error.errno is not None:
        raise UnreachableError(path, error) from None
    return Defect(f"{path} {where}", str(error) or type(error).__name__)


def _read_text(path: Path, rows: Rows) -> Iterator[Row]:
    if 0 not in rows:
        return
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_TEXT + 1)
    except OSError as error:
        raise UnreachableError(path, error) from None
    if len(content) > LARGEST_TEXT:
        yield 0, Defect(str(path), f"more than {LARGEST_TEXT:,} bytes: split it")
        return
    yield 0, _decoded(content, str(path))


def _read_json_lines(path: Path, rows: Rows) -> Iterator[Row]:
    line = -1
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            while content := file.readline(LARGEST_ROW + 1):
                line += 1
                where = f"{path} line {line + 1}"
                if len(content) > LARGEST_ROW:
                    if line in rows:
                        yield line, Defect(where, f"more than {LARGEST_ROW:,} bytes")
                    while content and not content.endswith(b"\n"):
                        content = file.readline(LARGEST_ROW)
                elif line in rows and content.strip():
                    yield from _with_text(line, content, where)
    except (OSError, EOFError, zlib.error) as error:
        yield line + 1, _defect(path, f"from line {line + 2} on", error)


def _read_parquet(path: Path, rows: Rows) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    row = 0
    try:
        with ParquetFile(path) as file:
            metadata, problem = file.metadata, _column_problem(str(path), file.schema_arrow)
        if problem is not None:
            yield 0, problem
            return
        # as a dictionary a text that a small file repeats a million times is held once
        options = {"read_dictionary": [TEXT_FIELD], "buffer_size": BUFFER, "metadata": metadata}
        with ParquetFile(path, **options) as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if row + size <= rows.first:
                    row += size
                    continue
                for batch in file.iter_batches(ROWS_AT_A_TIME, [group], [TEXT_FIELD]):
                    yield from _texts_of_column(path, batch.column(0), row, rows)
                    row += len(batch)
    except (ArrowException, OSError) as error:
        yield row, _defect(path, f"from row {row} on", error)


def _column_problem(path: str, schema: Any) -> Defect | None:
    from pyarrow import types

    if TEXT_FIELD not in schema.names:
        return Defect(path, f"no column {TEXT_FIELD!r}", of_another_kind=True)
    kind = schema.types[schema.names.index(TEXT_FIELD)]
    values = kind.value_type if types.is_dictionary(kind) else kind
    texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if any(is_kind(values) for is_kind in texts) or types.is_null(values):
        return None
    return Defect(path, f"column {TEXT_FIELD!r} holds {kind}, no strings")


def _texts_of_column(path: Path, column: Any, first: int, rows: Rows) -> Iterator[Row]:
    """Of a dictionary of strings or bytes (Spark writes texts as bytes), or of strings."""
    from pyarrow import DictionaryArray

    coded = isinstance(column, DictionaryArray)
    values = column.dictionary if coded else column
    places = column.indices.to_pylist() if coded else range(len(column))
    for row, place in enumerate(places, first):
        value = values[place].as_buffer() if row in rows and place is not None else None
        if value is None or not value.size:
            continue
        where = f"{path} row {row}"
        if value.size > LARGEST_ROW:
            yield row, Defect(where, f"more than {LARGEST_ROW:,} bytes")
        else:
            yield row, _decoded(value.to_pybytes(), where)


def _read_tar(path: Path, rows: Rows) -> Iterator[Row]:
    """Members .txt, and .json with a text."""
    number = 0
    try:
        # `tarfile` unpacks as much at once as a block of the file gives, `gzip` only what is read
        with (
            gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file,
            tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as archive,
        ):
            for number, member in enumerate(archive):
                suffix = Path(member.name).suffix.lower()
                if number not in rows or not member.isfile() or suffix not in (".txt", ".json"):
                    continue
                where = f"{path} member {member.name}"
                if member.size > LARGEST_ROW:
                    yield number, Defect(where, f"more than {LARGEST_ROW:,} bytes")
                    continue
                opened = archive.extractfile(member)
                assert opened is not None
                content = opened.read()
                if suffix == ".json":
                    yield from _with_text(number, content, where)
                elif content:
                    yield number, _decoded(content, where)
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        # ValueError: numbers in the attributes of a member that are none
        yield number, _defect(path, f"from member {number} on", error)


class _Header(tarfile.TarInfo):
    """Of a member; `tarfile` takes a broken one, and a missing one, for the end of the archive, and
    reads long names and attributes whole, however long."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            raise ReadError(f"no end of the archive, {error}") from error

    def _proc_member(self, tarfile: tarfile.TarFile) -> tarfile.TarInfo:
        is_content = self.type in CONTENT_TYPES
        if self.size < 0 or (self.size > LARGEST_HEADER and not is_content):
            raise ReadError(f"a header that says {self.size:,} bytes")
        return super()._proc_member(tarfile)  # pyright: ignore[reportAttributeAccessIssue]


CONTENT_TYPES = (*tarfile.REGULAR_TYPES, b"1", b"2", b"3", b"4", b"5", b"6")
"""Of members that are no attributes of others: files, links, devices, folders and FIFOs."""


def _with_text(row: int, content: bytes, where: str) -> Iterator[Row]:
    """The text of a JSON object; nothing if it is empty or null."""
    try:
        # numbers aren't used, and integers of many digits would be an error
        found = json.loads(content, parse_int=float)
    except RecursionError:
        yield row, Defect(where, "nested too deeply")
        return
    except ValueError as error:
        yield row, Defect(where, str(error))
        return
    if not isinstance(found, dict) or TEXT_FIELD not in found:
        yield row, Defect(where, f"no field {TEXT_FIELD!r}", of_another_kind=True)
        return
    text = found[TEXT_FIELD]
    if text is None or text == "":
        return
    yield row, text_of_value(text, where)


def text_of_value(value: Any, where: str) -> str | Defect:
    """A text from a row of others: a string, or bytes of one, of whole characters."""
    if isinstance(value, bytes):
        return _decoded(value, where)
    if not isinstance(value, str):
        return Defect(where, f"{TEXT_FIELD!r} is a {type(value).__name__}, no string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair
        return Defect(where, str(error))
    return value


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
