"""Documents of local files: texts, and rows of JSON lines, parquet, Arrow and tar files.

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

import codecs
import gzip
import json
import logging
import os
import stat
import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tarfile import EOFHeaderError, HeaderError, ReadError  # pyright: ignore[reportAttributeAccessIssue]
from typing import Literal, NamedTuple, NoReturn

from simvq_moe.data.held_out import content_key
from simvq_moe.data.rows import base
from simvq_moe.data.rows.base import (
    TEXT_FIELD,
    CorruptDataError,
    Defect,
    Row,
    Rows,
    UnreachableError,
    decoded,
    defect_of,
    missing,
    text_of_value,
)
from simvq_moe.data.rows.columns import read_arrow, read_parquet
from simvq_moe.data.rows.saved_sets import is_saved_set, shards
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import is_told, printable

PROSE = frozenset([".txt", ".md", ".rst", ".tex", ".html"])
CODE = frozenset(
    [".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts"]
)
TEXT_SUFFIXES = PROSE | CODE
"""Files that are one document each."""
NO_LIBRARY = frozenset(["site-packages", "dist-packages", "__pycache__"])
TESTS = frozenset(["test", "tests", "idle_test"])
GENERATED_TABLES = frozenset(["encodings", "pydoc_data"])
STDLIB_WITHOUT = NO_LIBRARY | TESTS | GENERATED_TABLES
"""Folders of the standard library that "python-stdlib" leaves out."""
ARROW = ".arrow"
LARGEST_TEXT = 2**30
"""Bytes of a file that is one document: 1 GiB."""
LARGEST_HEADER = 2**20
"""Bytes of a member's long name or other attributes: 1 MiB."""
EMBEDDED = "python-stdlib"
"""The source that every machine has."""
WAY_OUT = (
    "give a folder or file of text (.txt, .md, .py, ...), .jsonl, .parquet or .tar (its field is "
    "data.text_field), a folder that `datasets` has saved, or 'python-stdlib'"
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
    if is_saved_set(source):
        return [File(path, path.name) for path in shards(root)]
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
    suffix = path.suffix.lower()
    # of Arrow files only a saved data set says which they are
    return suffix in TEXT_SUFFIXES or (suffix != ARROW and reader_of(path) is not None)


def first_defect(path: Path, field: str = TEXT_FIELD) -> Defect | None:
    """What is wrong before the first text of a file: no UTF-8, no row with a text at all, or a
    broken row. Rows of another kind before it don't decide what the file is.

    Raises:
        UnreachableError: it can't be read now.
    """
    reader = reader_of(path)
    if reader is not None:
        first = Defect(str(path), f"no row with a {field!r}", of_another_kind=True)
        for number, (_, found) in enumerate(reader(path, Rows(field=field))):
            if not isinstance(found, Defect):
                return None
            if not found.of_another_kind:
                return found
            first = first if number else found
        return first
    try:
        with path.open(encoding="utf-8") as file:
            file.read(4096)
    except OSError as error:
        raise UnreachableError(path, error) from None
    except ValueError as error:
        return Defect(str(path), str(error), of_another_kind=True)
    return None


def check_readable(source: str, files: Sequence[File], field: str) -> None:
    """Make sure that one of the files has text; stops at the first.

    Raises:
        ConfigError: none has, or one before it can't be read now.
    """
    without = None
    for file in files:
        try:
            defect = first_defect(file.path, field)
        except UnreachableError as error:
            raise ConfigError(f"data.source {source!r}: {error}") from None
        if defect is None or not defect.of_another_kind:
            return
        without = without or (defect if file.has_rows else None)
    raise nothing_readable(source, without)


def nothing_readable(source: str, without: Defect | None = None) -> ConfigError:
    """What to say of a source of which no file has text.

    Args:
        without: what a file with rows lacks.
    """
    why = f"{without}: name one as data.text_field" if without else WAY_OUT
    return ConfigError(f"data.source {source!r} holds no readable text: {why}")


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
    yield from _document(0, content, str(path))


def _document(row: int, content: bytes, where: str) -> Iterator[Row]:
    """The text of a file, without the signature that says it is UTF-8; nothing if it is empty."""
    if text := content.removeprefix(codecs.BOM_UTF8):
        yield row, decoded(text, where)


def _read_json_lines(path: Path, rows: Rows) -> Iterator[Row]:
    line = -1
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            while content := file.readline(base.LARGEST_ROW + 1):
                line += 1
                where = f"{path} line {line + 1}"
                if len(content) > base.LARGEST_ROW:
                    if line in rows:
                        yield line, Defect(where, f"more than {base.LARGEST_ROW:,} bytes")
                    while content and not content.endswith(b"\n"):
                        content = file.readline(base.LARGEST_ROW)
                elif line in rows and content.strip():
                    yield from _with_text(line, content, where, rows.field)
    except (OSError, EOFError, zlib.error) as error:
        yield line + 1, defect_of(path, f"from line {line + 2} on", error)


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
                if member.size > base.LARGEST_ROW:
                    yield number, Defect(where, f"more than {base.LARGEST_ROW:,} bytes")
                    continue
                opened = archive.extractfile(member)
                assert opened is not None
                content = opened.read()
                if suffix == ".json":
                    yield from _with_text(number, content, where, rows.field)
                else:
                    yield from _document(number, content, where)
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        # ValueError: numbers in the attributes of a member that are none
        yield number, defect_of(path, f"from member {number} on", error)


class _Header(tarfile.TarInfo):
    """A member's header; `tarfile` takes a broken one, and a missing one, for the end of the
    archive, and reads long names and attributes whole, however long."""

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
"""Types of members that are no attributes of others: files, links, devices, folders, FIFOs."""


def _with_text(row: int, content: bytes, where: str, field: str) -> Iterator[Row]:
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
    if not isinstance(found, dict) or field not in found:
        there = found if isinstance(found, dict) else ()
        yield row, Defect(where, missing("field", field, there), of_another_kind=True)
        return
    text = found[field]
    if text is None or text == "":
        return
    yield row, text_of_value(text, where, field)


READERS: dict[str, Callable[[Path, Rows], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".json.gz": _read_json_lines,
    ".parquet": read_parquet,
    ARROW: read_arrow,
    ".tar": _read_tar,
    ".tar.gz": _read_tar,
}
"""Readers by the end of a file's name."""
