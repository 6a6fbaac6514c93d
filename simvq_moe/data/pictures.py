"""Where pictures come from: files in a folder, embedded photos, and data sets of the Hub.

A picture is opened when its pixels are asked for, and not before; what is kept of it is a path, or
a row of a data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from simvq_moe.merging import ConfigError

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
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for files that are truncated, damaged, absurdly large or no images."""
HUB, STREAM = "hf:", "hf-stream:"
"""Beginnings of a source that is a data set of the Hub, downloaded or streamed."""
REMEDY = "give a folder of images, 'hf:NAME' for a data set of the Hub, or 'photos'"


@runtime_checkable
class Picture(Protocol):
    """An image that can be opened by Pillow."""

    @property
    def name(self) -> str:
        """Its place in the source, the same on every machine: it decides whether it is held out."""
        ...

    @property
    def looks_like_one(self) -> bool:
        """Whether it is named like an image, so that it is reported where it can't be opened."""
        ...

    def open(self) -> Image.Image:
        """The image, its pixels not yet read; raises one of `UNREADABLE`."""
        ...


@dataclass(frozen=True)
class FilePicture:
    """An image file."""

    path: Path
    name: str

    @property
    def looks_like_one(self) -> bool:
        return self.path.suffix.lower() in Image.registered_extensions()

    def open(self) -> Image.Image:
        return Image.open(self.path)


@dataclass(frozen=True, eq=False)
class RowPicture:
    """An encoded image in a row of a data set."""

    rows: Any
    """A `datasets.Dataset`, or a list of such rows, with images as bytes or the place of a file."""
    column: str
    row: int

    @property
    def name(self) -> str:
        return f"row {self.row}"

    @property
    def looks_like_one(self) -> bool:
        return True

    def open(self) -> Image.Image:
        encoded = self.rows[self.row][self.column] or {}
        if encoded.get("bytes"):
            return Image.open(BytesIO(encoded["bytes"]))
        if encoded.get("path"):
            from fsspec.core import url_to_fs

            # a stream's place may be on the Hub, or within an archive
            files, path = url_to_fs(encoded["path"])
            return Image.open(BytesIO(files.cat_file(path)))
        raise ValueError("the row holds no image")


def pictures(source: str, limit: int) -> list[Picture]:
    """Every file or row that may be an image, in an order that is the same on every machine.

    Args:
        source: "photos", a folder with all its subfolders, an image file, "hf:NAME[:SPLIT]" or
            "hf-stream:NAME[:SPLIT]"; NAME is one of the Hub, or a local folder in a form that
            `datasets` reads; SPLIT is train where it is missing.
        limit: rows that are taken from a stream, whose encoded images are kept in memory.

    Raises:
        ConfigError: the source doesn't exist, breaks off, or has no image column.
    """
    if source.startswith((HUB, STREAM)):
        return _rows(source, limit)
    return list(_files(source))


def exists(source: str) -> bool:
    """Whether there is an image; stops at the first, and asks nothing of the Hub.

    Raises:
        ConfigError: the source doesn't exist.
    """
    if source.startswith((HUB, STREAM)):
        return bool(_name_and_split(source)[0])
    return any(pixel_size(picture) for picture in _files(source))


def pixel_size(picture: Picture) -> tuple[int, int] | None:
    """Width and height from the header; None: Pillow can't open it."""
    try:
        with picture.open() as image:
            return image.size
    except UNREADABLE:
        return None


def _files(source: str) -> Iterator[FilePicture]:
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
    for path in sorted(path for path in root.rglob("[!.]*") if path.is_file()):
        yield FilePicture(path, path.relative_to(root).as_posix())


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
    try:
        found = datasets.load_dataset(name, split=split, streaming=streaming)
        columns = found.features or {}
        images = [column for column, kind in columns.items() if isinstance(kind, datasets.Image)]
        rows: Any = []
        if images:
            # encoded, so that opening a row decodes no pixels
            encoded = found.select_columns(images[:1]).cast_column(
                images[0], datasets.Image(decode=False)
            )
            rows = list(encoded.take(limit)) if streaming else encoded
    except Exception as error:  # whatever the Hub, the network or a file format may raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"data.source {source!r} can't be loaded ({reason}): {REMEDY}") from None
    if not images:
        raise ConfigError(
            f"data.source {source!r} has no image column among {', '.join(columns) or 'none'}: "
            f"{REMEDY}"
        )
    return [RowPicture(rows, images[0], i) for i in range(len(rows))]
