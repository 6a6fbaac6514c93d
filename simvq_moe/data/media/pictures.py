"""Where pictures come from: files in a folder, embedded photos, and data sets of the Hub.

A picture is opened when its pixels are asked for, and not before; what is kept of it is a path, or
a row of a data set.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from simvq_moe.data.rows.saved_sets import is_saved_set, shards
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import BrokenFileError, open_regular, printable

PHOTOS = (
    "skimage/data/astronaut.png",
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "skimage/data/rocket.jpg",
    "skimage/data/motorcycle_left.png",
    "skimage/data/ihc.png",
    "skimage/data/hubble_deep_field.jpg",
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
)
"""The embedded photos, as package/path."""
MOST_BYTES = 2**30
"""Bytes of an encoded picture at most; some decoders read all of them at once."""
NO_PICTURES = {"EPS", "FITS"}
"""Formats that are not opened: Ghostscript would run the program that an EPS is, and a FITS may
unpack to any size."""
HUB, STREAM = "hf:", "hf-stream:"
"""Beginnings of a source that is a data set of the Hub, downloaded or streamed."""
REMEDY = (
    "give a folder of images, or one that `datasets` has saved, 'hf:NAME' for a data set of the "
    "Hub, or 'photos'"
)

Encoded = BufferedReader | BytesIO


class TooLargeError(ValueError):
    """A picture has more bytes or pixels than are read."""


class NoPictureError(ValueError):
    """A row holds none."""


@runtime_checkable
class Picture(Protocol):
    """An encoded image."""

    @property
    def name(self) -> str:
        """Its place in the source, the same on every machine."""
        ...

    @property
    def where(self) -> str:
        """Names it in an error."""
        ...

    @property
    def looks_like_one(self) -> bool:
        """Whether it is named like an image, so that it is reported where it can't be opened."""
        ...

    def stream(self) -> Encoded:
        """Its bytes, to be closed after use.

        Raises:
            BrokenFileError: they can't be read now.
            TooLargeError: they are too many.
            NoPictureError: there are none.
        """
        ...


@dataclass(frozen=True)
class FilePicture:
    """An image file."""

    path: Path
    name: str

    @property
    def where(self) -> str:
        return str(self.path)

    @property
    def looks_like_one(self) -> bool:
        return self.path.suffix.lower() in Image.registered_extensions()

    def stream(self) -> Encoded:
        file = open_regular(self.path)
        assert isinstance(file, BufferedReader)
        if os.fstat(file.fileno()).st_size > MOST_BYTES:
            file.close()
            raise TooLargeError(f"more than {MOST_BYTES:,} bytes")
        return file


class Spooled:
    """Rows of a stream, their encoded images in a temporary file: they may be more than memory
    holds. It has no name, so that it goes with the process, also when that is killed."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], column: str) -> None:
        self.column = column
        self.file = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the rows
        weakref.finalize(self, self.file.close)
        self.places: list[tuple[int, int] | str | None] = []
        for row in rows:
            encoded = row[column] or {}
            place = encoded.get("path")
            if encoded.get("bytes"):
                place = (self.file.tell(), len(encoded["bytes"]))
                self.file.write(encoded["bytes"])
            self.places.append(place)
        self.file.flush()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> dict[str, dict[str, Any]]:
        place = self.places[row]
        if not isinstance(place, tuple):
            return {self.column: {"path": place}}
        start, size = place
        return {self.column: {"bytes": os.pread(self.file.fileno(), size, start)}}


@dataclass(frozen=True, eq=False)
class RowPicture:
    """An encoded image in a row of a data set."""

    rows: Any
    """A `datasets.Dataset`, or `Spooled` rows, with images as bytes or the place of a file."""
    column: str
    row: int

    @property
    def name(self) -> str:
        return f"row {self.row}"

    @property
    def where(self) -> str:
        return f"data.source, {self.name},"

    @property
    def looks_like_one(self) -> bool:
        return True

    def stream(self) -> Encoded:
        encoded = self.rows[self.row][self.column] or {}
        content = encoded.get("bytes") or self._fetched(encoded.get("path"))
        if len(content) > MOST_BYTES:
            raise TooLargeError(f"more than {MOST_BYTES:,} bytes")
        return BytesIO(content)

    def _fetched(self, place: str | None) -> bytes:
        """The content of a file, which may be on the Hub or within an archive."""
        from fsspec.core import url_to_fs

        if not place:
            raise NoPictureError("the row holds no image")
        try:
            files, path = url_to_fs(place)
            return files.cat_file(path)
        except (FileNotFoundError, LookupError, ValueError):
            raise NoPictureError(f"the row's image {place} does not exist") from None
        except Exception as error:  # whatever a network, a store or an archive may raise
            reason = f"can't be read now: {place}: {' '.join(str(error).split())}"
            raise BrokenFileError(self.where, reason) from None


def open_image(file: Encoded) -> Image.Image:
    """The image, its pixels not yet read; raises anything for bytes that are none."""
    Image.init()
    return Image.open(file, formats=[form for form in Image.ID if form not in NO_PICTURES])


def pictures(source: str, limit: int) -> list[Picture]:
    """Every file or row that may be an image, in an order that is the same on every machine.

    Args:
        source: "photos", a folder with all its subfolders, an image file, "hf:NAME[:SPLIT]" or
            "hf-stream:NAME[:SPLIT]", or a folder that `Dataset.save_to_disk` wrote; NAME is one of
            the Hub, or a local folder in a form that `datasets` reads; SPLIT is train where it is
            missing.
        limit: rows that are taken from a stream, whose encoded images are kept in a temporary file.

    Raises:
        ConfigError: the source doesn't exist, breaks off, or has no image column.
    """
    if source.startswith((HUB, STREAM)):
        return _rows(source, limit)
    return _saved_rows(source) if is_saved_set(source) else list(files(source))


def hub_name(source: str) -> str | None:
    """NAME of a source that is a data set of the Hub; None: it is another one."""
    return _name_and_split(source)[0] if source.startswith((HUB, STREAM)) else None


def files(source: str) -> Iterator[FilePicture]:
    """Every file that may be an image, see `pictures`.

    Raises:
        ConfigError: the source doesn't exist, or a folder can't be read now.
    """
    if source == "photos":
        found = [path for path in map(_installed, PHOTOS) if path is not None]
        yield from (FilePicture(path, path.name) for path in found)
        return
    root = Path(source)
    if not root.exists():
        raise ConfigError(f"data.source {source!r} does not exist: {REMEDY}")
    if root.is_file():
        yield FilePicture(root, root.name)
        return
    for path in sorted(_paths(root)):
        yield FilePicture(path, path.relative_to(root).as_posix())


def _paths(root: Path) -> Iterator[Path]:
    """Files below a folder, also those behind links; each folder once, so that loops end."""

    def stop(error: OSError) -> None:
        reason = f"can't be read now: {error.strerror}: make it readable, or take it out"
        raise BrokenFileError(error.filename, reason)

    seen = set()
    for folder, subfolders, names in os.walk(root, onerror=stop, followlinks=True):
        found = os.stat(folder)
        if (found.st_dev, found.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        # the order says by which of its names a folder is known; lost+found is root's alone
        subfolders[:] = sorted(set(subfolders) - {"lost+found"})
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        yield from (path for path in paths if path.is_file())


def _installed(photo: str) -> Path | None:
    """Where a package keeps a photo; finds the package without the seconds of importing it."""
    package, _, rest = photo.partition("/")
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0], rest) if folders else None


def _name_and_split(source: str) -> tuple[str, str]:
    name, _, split = source.partition(":")[2].partition(":")
    return name, split or "train"


def _rows(source: str, limit: int) -> list[Picture]:
    import datasets  # slow to import

    name, split = _name_and_split(source)
    streaming = source.startswith(STREAM)
    rows: Any = []
    try:
        found = datasets.load_dataset(name, split=split, streaming=streaming)
        columns = list(found.features or {})
        encoded, column = _encoded(found)
        if column is not None:
            rows = Spooled(encoded.take(limit), column) if streaming else encoded
    except Exception as error:  # whatever the Hub, the network or a file format may raise
        raise _not_loaded(source, error) from None
    if column is None:
        raise _no_column(source, columns)
    return [RowPicture(rows, column, i) for i in range(len(rows))]


def _encoded(found: Any) -> tuple[Any, str | None]:
    """A data set with its first column of images alone, these encoded, so that opening a row
    decodes no pixels; None: it has none."""
    import datasets

    columns = found.features or {}
    images = [column for column, kind in columns.items() if isinstance(kind, datasets.Image)]
    if not images:
        return found, None
    alone = found.select_columns(images[:1])
    return alone.cast_column(images[0], datasets.Image(decode=False)), images[0]


def _not_loaded(source: str, error: Exception) -> ConfigError:
    reason = f"{type(error).__name__}: {printable(' '.join(str(error).split()))}"
    return ConfigError(f"data.source {source!r} can't be loaded ({reason}): {REMEDY}")


def _no_column(source: str, columns: Iterable[str]) -> ConfigError:
    names = ", ".join(map(printable, columns)) or "none"
    return ConfigError(f"data.source {source!r} has no image column among {names}: {REMEDY}")


class Embedded:
    """Rows whose images are bytes in them: a path in a stranger's data set is not followed."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows, self.column = rows, column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, dict[str, Any]]:
        encoded = self.rows[row][self.column] or {}
        return {self.column: {"bytes": encoded.get("bytes")}}


def _saved_rows(source: str) -> list[Picture]:
    """The images of a split that was saved to disk."""
    import datasets

    files = shards(Path(source))
    try:
        parts = [datasets.Dataset.from_file(str(file)) for file in files]
        whole = datasets.concatenate_datasets(parts)
        columns = whole.column_names
        encoded, column = _encoded(whole)
        whole.data.validate(full=True)  # offsets of a stranger may point anywhere
    except Exception as error:  # whatever a broken file makes Arrow raise
        raise _not_loaded(source, error) from None
    if column is None:
        raise _no_column(source, columns)
    rows = Embedded(encoded, column)
    return [RowPicture(rows, column, i) for i in range(len(rows))]
