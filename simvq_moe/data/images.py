"""Square RGB crops at random places of photos, held in memory as bytes.

"photos" are nine pictures that the wheels of scikit-image and scikit-learn ship, so that a fresh
machine trains on real input without a download. Any other source is a folder of images. Held-out
crops come from other files, or, where files are few, from the right end of every image: no pixel
of them is ever seen in training.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor

from simvq_moe.data.order import Indices, held_out_by_name
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
LEFT_SHARE = 0.82
"""Share of an image's width that training sees, where every image is split left and right."""
FILES_TO_SPLIT_BY_FILE = 20
"""From this many images on, whole files are held out instead."""
HELD_OUT_SHARE = 0.1
"""Share of the files held out then."""
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for files that are truncated, damaged, absurdly large or no images."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageCrops:
    """A fixed set of square RGB crops."""

    images: UInt8[Tensor, "crops 3 size size"]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Indices) -> Float32[Tensor, "batch 3 size size"]:
        """The crops named by indices, with the bytes 0 to 255 as -1 to 1."""
        return self.images[torch.tensor(np.asarray(indices))].float() / 127.5 - 1


class _Part(NamedTuple):
    """The columns of an image that one side of the split draws from."""

    path: Path
    columns: Literal["all", "left", "right"]


class _Split(NamedTuple):
    train: list[_Part]
    held_out: list[_Part]
    skipped: list[Path]


def image_crops(
    source: str, *, size: int, crops: int, held_out_crops: int, seed: int
) -> tuple[ImageCrops, ImageCrops]:
    """Training and held-out crops of `source`, the same for the same seed.

    Args:
        source: "photos", or a folder that is searched for images with all its subfolders.
        size: pixels a side.
        crops: number of training crops, equally many from each image.
        held_out_crops: number of held-out crops, likewise.
        seed: of the places of the crops.

    Raises:
        ConfigError: the source doesn't exist, or holds no image that is readable and large enough.
    """
    split = _split(source, size)
    train, broken = _draw(split.train, crops, size, np.random.default_rng([seed, 0]))
    held_out, broken_too = _draw(
        split.held_out, held_out_crops, size, np.random.default_rng([seed, 1])
    )
    if len(train) < crops or len(held_out) < held_out_crops:
        raise ConfigError(
            f"data.source {source!r} holds no image that is readable and large enough for "
            f"data.image_size {size}: lower it, give larger images, of which few are cut into a "
            "left and a narrow held-out right part each, or 'photos'"
        )
    if skipped := list(dict.fromkeys(split.skipped + broken + broken_too)):
        some = ", ".join(path.name for path in skipped[:5]) + (", ..." if skipped[5:] else "")
        log.warning("%s: skipped %d unreadable or too small images: %s", source, len(skipped), some)
    return ImageCrops(train), ImageCrops(held_out)


def check_source(source: str) -> None:
    """Make sure that there is an image; stops at the first and reads no pixels.

    Raises:
        ConfigError: the source doesn't exist, or holds no image.
    """
    if not any(_pixel_size(path) for path in _paths(source)):
        raise ConfigError(
            f"data.source {source!r} holds no readable image: give a folder of images or 'photos'"
        )


def _paths(source: str) -> list[Path]:
    """Every file that may be an image, in an order that is the same on every machine."""
    if source == "photos":
        return [path for path in map(_installed, PHOTOS) if path is not None]
    root = Path(source)
    if not root.exists():
        raise ConfigError(
            f"data.source {source!r} does not exist: give a folder of images or 'photos'"
        )
    if root.is_file():
        return [root]
    return sorted(path for path in root.rglob("[!.]*") if path.is_file())


def _installed(photo: str) -> Path | None:
    """Where a package keeps a photo; finds the package without the seconds of importing it."""
    package, _, rest = photo.partition("/")
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0], rest) if folders else None


def _pixel_size(path: Path) -> tuple[int, int] | None:
    """Width and height from the header; None: Pillow can't open the file."""
    try:
        with Image.open(path) as image:
            return image.size
    except UNREADABLE:
        return None


def _split(source: str, size: int) -> _Split:
    """What training and held-out crops are drawn from, and the images that can't be used.

    Files that neither are images nor are named like one (a README) are passed over in silence.
    """
    sizes = {path: _pixel_size(path) for path in _paths(source)}
    readable = {path: pixels for path, pixels in sizes.items() if pixels}
    usable = [path for path, pixels in readable.items() if min(pixels) >= size]
    if len(usable) >= FILES_TO_SPLIT_BY_FILE:
        names = [path.relative_to(source).as_posix() for path in usable]
        sides = dict(zip(usable, held_out_by_name(names, HELD_OUT_SHARE), strict=True))
        train = [_Part(path, "all") for path in usable if not sides[path]]
        held_out = [_Part(path, "all") for path in usable if sides[path]]
    else:
        widths = {path: readable[path][0] for path in usable}
        usable = [path for path in usable if widths[path] - _border(widths[path]) >= size]
        train = [_Part(path, "left") for path in usable]
        held_out = [_Part(path, "right") for path in usable]
    named_like_images = Image.registered_extensions()
    skipped = [
        path
        for path in sizes.keys() - set(usable)
        if path in readable or path.suffix.lower() in named_like_images
    ]
    return _Split(train, held_out, sorted(skipped))


def _border(width: int) -> int:
    """The first held-out column."""
    return int(LEFT_SHARE * width)


def _draw(
    parts: list[_Part], count: int, size: int, rng: np.random.Generator
) -> tuple[UInt8[Tensor, "crops 3 size size"], list[Path]]:
    """`count` crops, as equally many from each part as possible, and the images that broke.

    What a damaged image would have given is drawn from the others. Fewer crops than asked for
    come back only if every image is damaged.
    """
    pieces, broken, missing = [np.empty((0, 3, size, size), dtype=np.uint8)], [], count
    while missing and parts:
        quotas = np.full(len(parts), missing // len(parts))
        quotas[rng.permutation(len(parts))[: missing % len(parts)]] += 1
        sound = []
        for part, quota in zip(parts, quotas, strict=True):
            pixels = _pixels(part) if quota else None
            if pixels is not None:
                pieces.append(_crop(pixels, int(quota), size, rng))
                missing -= int(quota)
            if quota and pixels is None:
                broken.append(part.path)
            else:
                sound.append(part)
        parts = sound
    return torch.from_numpy(np.concatenate(pieces)), broken


def _pixels(part: _Part) -> UInt8[np.ndarray, "height width 3"] | None:
    """The part's RGB bytes; None: the file is damaged."""
    try:
        with Image.open(part.path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except UNREADABLE:
        return None
    border = _border(pixels.shape[1])
    columns = {"all": slice(None), "left": slice(border), "right": slice(border, None)}
    return pixels[:, columns[part.columns]]


def _crop(
    pixels: UInt8[np.ndarray, "height width 3"], count: int, size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "crops 3 size size"]:
    """Crops at independent, uniform places."""
    at_every_place = np.lib.stride_tricks.sliding_window_view(pixels, (size, size), axis=(0, 1))
    height, width = at_every_place.shape[:2]
    return at_every_place[rng.integers(height, size=count), rng.integers(width, size=count)]
