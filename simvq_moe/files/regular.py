"""Files that may be anybody's are read whole, bounded and validated, or refused in one line.

Files of ours are written so that a reader, or a machine that loses power, sees all or nothing.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from simvq_moe.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import ValidationError

T = TypeVar("T")

TEXT_LIMIT = 2**28
"""Bytes of a file of text or JSON that are read at most: 256 MiB."""
LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
"""Failures of fsync that lose data; others say that a file system has no such call."""


class BrokenFileError(ConfigError):
    """A file that can't be used: one line with its path and the reason."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{printable(str(self.path))} {printable(self.reason)}"


class MissingFileError(BrokenFileError):
    """There is no such file."""


def printable(text: str) -> str:
    """The text in one line, with whatever a terminal would obey written as an escape: control
    characters, line ends, marks of direction, and bytes of file names that are not UTF-8."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(character) for character in text)


def is_told(number: int) -> bool:
    """Whether the so manieth of defects that are passed over gets a line: the first five, and then
    ever fewer, because there may be millions."""
    return number <= 5 or str(number).strip("0") == "1"


def read_bytes(path: Path, *, limit: int = TEXT_LIMIT, inside: Path | None = None) -> bytes:
    """The content of a regular file.

    Args:
        limit: bytes that it may have.
        inside: folder that the file must lie in once links are followed; None: anywhere.

    Raises:
        MissingFileError: there is no such file.
        BrokenFileError: it is a folder, a FIFO or a device, lies elsewhere, is larger than `limit`,
            or can't be read.
    """
    with open_regular(path, inside=inside) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise BrokenFileError(path, f"has {size:,} bytes: at most {limit:,} are read")
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise _unreadable(path, error) from None
    if len(content) > limit:  # it grew, or its size is not known as in /proc
        raise BrokenFileError(path, f"has more than {limit:,} bytes")
    return content


def open_regular(path: Path, *, inside: Path | None = None) -> IO[bytes]:
    """A regular file, opened without waiting for a writer as a FIFO would; see `read_bytes`."""
    if inside is not None and not is_inside(path, inside):
        raise BrokenFileError(path, f"is a link out of {inside}: its target is not read")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(path, "does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BrokenFileError(path, "is no regular file")
    return os.fdopen(descriptor, "rb")


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path leads into a folder once all links are followed."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, a null byte
        return False


def read_text(path: Path, *, limit: int = TEXT_LIMIT, inside: Path | None = None) -> str:
    """The text of a UTF-8 file; see `read_bytes`.

    Raises:
        BrokenFileError: likewise, or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit=limit, inside=inside).decode()
    except UnicodeDecodeError as error:
        raise BrokenFileError(path, f"is not UTF-8 text: byte {error.start}") from None


def parse_json(text: str | bytes, where: Path | str) -> Any:
    """What a JSON text says, nested up to some hundreds deep.

    Args:
        where: names the text in an error.

    Raises:
        BrokenFileError: it is no JSON.
    """
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()  # refuses halves of characters
    except (ValueError, RecursionError) as error:
        raise BrokenFileError(where, f"is not readable JSON: {error}") from None
    return found


def validate_json(text: str | bytes, schema: type[T], where: Path | str) -> T:
    """What a JSON text says, as an instance of a pydantic model, dataclass or any other type.

    Types are strict: a number in quotes is no number.

    Raises:
        BrokenFileError: it is no JSON, or none of the schema; names the first key that is wrong.
    """
    from pydantic import ValidationError

    try:
        return _adapter(schema).validate_json(text, strict=True)
    except ValidationError as error:
        raise BrokenFileError(where, _first_defect(error)) from None


def validate(content: Any, schema: type[T], where: Path | str) -> T:
    """Plain containers, such as those of YAML, as an instance of a schema; see `validate_json`."""
    from pydantic import ValidationError

    try:
        return _adapter(schema).validate_python(content, strict=True)
    except ValidationError as error:
        raise BrokenFileError(where, _first_defect(error)) from None


def read_json(
    path: Path, schema: type[T], *, limit: int = TEXT_LIMIT, inside: Path | None = None
) -> T:
    """The content of a JSON file of a schema; see `read_bytes` and `validate_json`."""
    return validate_json(read_bytes(path, limit=limit, inside=inside), schema, path)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file whole: readers see the old content or the new, also after a power cut."""
    with written_whole(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Mapping[str, Any], *, apart: str = "") -> None:
    """Replace a JSON file whole; see `written_whole`."""
    with written_whole(path, apart=apart) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n")


@contextmanager
def written_whole(path: Path, *, apart: str = "") -> Iterator[Path]:
    """A path beside `path`, with the same suffix, to write to; what stands there at the end becomes
    `path`, on disk before it has its name. After an error nothing of it is left,
    and an error of the system names it.

    Args:
        apart: tells several processes apart that may write the same file at once.
    """
    aside = path.with_name(f".tmp-{apart}{path.name}")
    aside.unlink(missing_ok=True)
    try:
        with aside.open("xb"):
            mode = stat.S_IMODE(aside.stat().st_mode)  # what umask leaves
        yield aside
        if stat.S_IMODE(aside.stat().st_mode) != mode:  # safetensors writes for the owner alone
            with suppress(OSError):  # many mounts know no permissions of files
                os.chmod(aside, mode)
        _sync(aside)
        aside.replace(path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise _naming(error, path) from error
        raise
    sync_folder(path.parent)


def _naming(error: OSError, path: Path) -> OSError:
    """The error of a disk that is full, or broken, with the file that it kept from being written.
    numpy's own of an array of which a part was written has neither number nor reason."""
    number = errno.EIO if error.errno is None else error.errno
    return OSError(number, error.strerror or f"is not written whole: {error}", str(path))


def sync_folder(folder: Path) -> None:
    """Make names in a folder last; quiet where the file system has no such call."""
    try:
        _sync(folder)
    except OSError as error:  # also of opening it
        if error.errno in LOST:
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Make what was written to an open file last; quiet where the file system has no such call."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in LOST:
            raise


def _visible(character: str) -> str:
    # controls, format marks, surrogates, line and paragraph separators
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character


def _unreadable(path: Path, error: OSError | ValueError) -> BrokenFileError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return BrokenFileError(path, f"can't be read: {reason}")


@lru_cache
def _adapter(schema: Any) -> Any:
    from pydantic import TypeAdapter  # costs a tenth of a second, which `--help` need not pay

    return TypeAdapter(schema)


def _first_defect(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return f"is not readable JSON: {first['msg']}"
    key = ".".join(str(part) for part in first["loc"])
    value = repr(first["input"])
    shown = value if len(value) <= 60 else f"{value[:57]}..."
    return f"has {key or 'content'} {shown}: {first['msg']}"
