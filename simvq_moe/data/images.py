"""Square RGB crops at random places of photos, as bytes.

"photos" are nine pictures that the wheels of scikit-image and scikit-learn ship, so that a fresh
machine trains on real input without a download. Any other source is a folder of images or a data
set of the Hub, see `pictures`. Held-out crops come from a source of their own, from other files,
or, where files are few, from the right end of every image: no pixel of them is ever seen in
training.

A set that fits into memory is decoded once (`ImageCrops`), a larger one batch by batch
(`LazyCrops`); the crops are the same.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor

from simvq_moe.data.order import Indices, held_out_by_name
from simvq_moe.data.pictures import (
    PHOTOS,
    REMEDY,
    UNREADABLE,
    Picture,
    exists,
    pictures,
    pixel_size,
)
from simvq_moe.merging import ConfigError

__all__ = ["PHOTOS", "ImageCrops", "LazyCrops", "check_source", "image_crops"]

LEFT_SHARE = 0.82
"""Share of an image's width that training sees, where every image is split left and right."""
FILES_TO_SPLIT_BY_FILE = 20
"""From this many images on, whole files are held out instead."""
HELD_OUT_SHARE = 0.1
"""Share of the files held out then."""
NAMED = 5
"""Images that a warning names; the rest are counted."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageCrops:
    """A fixed set of square RGB crops in memory."""

    images: UInt8[Tensor, "crops 3 size size"]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Indices) -> Float32[Tensor, "batch 3 size size"]:
        """The crops named by indices, with the bytes 0 to 255 as -1 to 1."""
        return self.images[torch.tensor(np.asarray(indices))].float() / 127.5 - 1

    def digest(self) -> str:
        """Differs when the crops differ."""
        return hashlib.blake2b(self.images.numpy().tobytes(), digest_size=16).hexdigest()


class _Part(NamedTuple):
    """The columns of an image that one side of the split draws from."""

    picture: Picture
    columns: Literal["all", "left", "right"]
    scale: float
    """Of its height and width before cropping."""

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height to draw from, of a picture of that size."""
        first, end = _columns(width, self.columns)
        return round((end - first) * self.scale), round(height * self.scale)


class LazyCrops:
    """A fixed set of square RGB crops, decoded when a batch asks for them.

    Crops that were decoded are kept as bytes until `memory` of them are; the others are decoded
    again, by threads. What a damaged image would have given comes from the image after it.

    Args:
        parts: what is drawn from.
        quotas: crops of each part, which lie one after another.
        places: top and left of every crop.
        size: pixels a side.
        memory: bytes of decoded crops to keep.
    """

    def __init__(
        self,
        parts: Sequence[_Part],
        quotas: np.ndarray,
        places: np.ndarray,
        size: int,
        memory: int,
    ) -> None:
        self.parts, self.places, self.size = parts, places, size
        self.part_of = np.repeat(np.arange(len(parts)), quotas)
        self.room = memory // (3 * size * size)
        self.kept: dict[int, UInt8[np.ndarray, "3 size size"]] = {}
        self.broken: set[int] = set()
        self.threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1))

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, indices: Indices) -> Float32[Tensor, "batch 3 size size"]:
        """The crops named by indices, with the bytes 0 to 255 as -1 to 1."""
        names = np.asarray(indices).tolist()
        crops = np.empty((len(names), 3, self.size, self.size), dtype=np.uint8)
        for i, crop in enumerate(self.threads.map(self._crop, names)):
            crops[i] = crop
        return torch.from_numpy(crops).float() / 127.5 - 1

    def digest(self) -> str:
        """Differs when the files' names or the places of the crops differ."""
        found = hashlib.blake2b(self.places.tobytes() + self.part_of.tobytes(), digest_size=16)
        for part in self.parts:
            found.update(f"{part.picture.name}/{part.columns}/{part.scale}\n".encode())
        return found.hexdigest()

    def _crop(self, index: int) -> UInt8[np.ndarray, "3 size size"]:
        if index in self.kept:
            return self.kept[index]
        first = int(self.part_of[index])
        for step in range(len(self.parts)):
            number = (first + step) % len(self.parts)
            pixels = None if number in self.broken else _pixels(self.parts[number])
            if pixels is None:
                self._report(number)
                continue
            room = np.array(pixels.shape[:2]) - self.size
            top, left = np.minimum(self.places[index], room)
            crop = pixels[top : top + self.size, left : left + self.size].transpose(2, 0, 1)
            if len(self.kept) < self.room:
                self.kept[index] = np.ascontiguousarray(crop)
            return crop
        raise ValueError("every image of the data set is damaged")

    def _report(self, number: int) -> None:
        if number not in self.broken:
            self.broken.add(number)
            some = len(self.broken) <= NAMED
            name = self.parts[number].picture.name if some else "and more, which are not named"
            log.warning("skipped damaged image %d: %s", len(self.broken), name)


class _Split(NamedTuple):
    train: list[_Part]
    held_out: list[_Part]
    sizes: dict[Picture, tuple[int, int]]
    skipped: list[Picture]


def image_crops(
    source: str,
    *,
    size: int,
    crops: int,
    held_out_crops: int,
    seed: int,
    held_out_source: str | None = None,
    shorter_side: int = 0,
    memory: int = 2**32,
) -> tuple[ImageCrops | LazyCrops, ImageCrops | LazyCrops]:
    """Training and held-out crops of `source`, the same for the same seed.

    Args:
        source: "photos", a folder that is searched for images with all its subfolders, or
            "hf:NAME[:SPLIT]" or "hf-stream:NAME[:SPLIT]", a data set of the Hub.
        size: pixels a side.
        crops: number of training crops, equally many from each image.
        held_out_crops: number of held-out crops, likewise.
        seed: of the places of the crops.
        held_out_source: what held-out crops are drawn from; None: a part of `source`.
        shorter_side: pixels that the shorter side of every image is resized to before it is
            cropped; 0: images are cropped as they are.
        memory: bytes of decoded crops; a set that needs more is decoded batch by batch.

    Raises:
        ConfigError: a source doesn't exist, or holds no image that is readable and large enough.
    """
    wanted = crops + held_out_crops
    split = _split(source, size, shorter_side, wanted, whole=held_out_source is not None)
    if held_out_source is not None:
        other = _split(held_out_source, size, shorter_side, held_out_crops, whole=True)
        split = _Split(
            split.train, other.train, split.sizes | other.sizes, split.skipped + other.skipped
        )
    sides = ((split.train, crops, 0), (split.held_out, held_out_crops, 1))
    room = memory // max(1, 3 * size * size)
    sets: list[ImageCrops | LazyCrops] = []
    skipped = list(split.skipped)
    for parts, count, side in sides:
        rng = np.random.default_rng([seed, side])
        if count > room and parts:
            sets.append(_lazy(parts, split.sizes, count, size, rng, memory))
        else:
            drawn, broken = _draw(parts, count, size, rng)
            skipped += broken
            sets.append(ImageCrops(drawn))
    if len(sets[0]) < crops or len(sets[1]) < held_out_crops:
        raise ConfigError(
            f"data.source {source!r} holds no image that is readable and large enough for "
            f"data.image_size {size}: lower it, set data.shorter_side, give larger images, of "
            "which few are cut into a left and a narrow held-out right part each, or 'photos'"
        )
    if skipped := list(dict.fromkeys(skipped)):
        names = [picture.name.rpartition("/")[2] for picture in skipped[:NAMED]]
        some = ", ".join(names) + (", ..." if skipped[NAMED:] else "")
        log.warning("%s: skipped %d unreadable or too small images: %s", source, len(skipped), some)
    return sets[0], sets[1]


def check_source(source: str) -> None:
    """Make sure that there is an image; stops at the first and reads no pixels.

    Raises:
        ConfigError: the source doesn't exist, or holds no image.
    """
    if not exists(source):
        raise ConfigError(f"data.source {source!r} holds no readable image: {REMEDY}")


def _split(source: str, size: int, shorter_side: int, limit: int, *, whole: bool) -> _Split:
    """What training and held-out crops are drawn from, and the images that can't be used.

    Files that neither are images nor are named like one (a README) are passed over in silence.
    """
    found = pictures(source, limit)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        headers = dict(zip(found, threads.map(pixel_size, found), strict=True))
    sizes = {picture: pixels for picture, pixels in headers.items() if pixels}
    parts = {
        picture: _Part(picture, "all", shorter_side / min(pixels) if shorter_side else 1.0)
        for picture, pixels in sizes.items()
    }

    def fits(part: _Part) -> bool:
        return min(part.size(*sizes[part.picture])) >= size

    usable = [part for part in parts.values() if fits(part)]
    if whole:
        train, held_out = usable, []
    elif len(usable) >= FILES_TO_SPLIT_BY_FILE:
        sides = held_out_by_name([part.picture.name for part in usable], HELD_OUT_SHARE)
        train, held_out = (
            [part for part, side in zip(usable, sides, strict=True) if side is right]
            for right in (False, True)
        )
    else:
        usable = [part for part in usable if fits(part._replace(columns="right"))]
        train = [part._replace(columns="left") for part in usable]
        held_out = [part._replace(columns="right") for part in usable]
    used = {part.picture for part in usable}
    skipped = [
        picture
        for picture in found
        if picture not in used and (picture in sizes or picture.looks_like_one)
    ]
    return _Split(train, held_out, sizes, skipped)


def _columns(width: int, columns: Literal["all", "left", "right"]) -> tuple[int, int]:
    """The first column and the one after the last."""
    border = int(LEFT_SHARE * width)
    return {"all": (0, width), "left": (0, border), "right": (border, width)}[columns]


def _quotas(parts: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` crops, as equally many from each part as possible."""
    quotas = np.full(parts, count // parts)
    quotas[rng.permutation(parts)[: count % parts]] += 1
    return quotas


def _lazy(
    parts: list[_Part],
    sizes: dict[Picture, tuple[int, int]],
    count: int,
    size: int,
    rng: np.random.Generator,
    memory: int,
) -> LazyCrops:
    """The crops that `_draw` would give if no image were damaged."""
    quotas = _quotas(len(parts), count, rng)
    places = [np.empty((0, 2), dtype=np.int64)]
    for part, quota in zip(parts, quotas, strict=True):
        if quota:
            width, height = part.size(*sizes[part.picture])
            places.append(_places(height, width, int(quota), size, rng))
    return LazyCrops(parts, quotas, np.concatenate(places).astype(np.int32), size, memory)


def _draw(
    parts: list[_Part], count: int, size: int, rng: np.random.Generator
) -> tuple[UInt8[Tensor, "crops 3 size size"], list[Picture]]:
    """`count` crops, as equally many from each part as possible, and the images that broke.

    What a damaged image would have given is drawn from the others. Fewer crops than asked for
    come back only if every image is damaged.
    """
    pieces, broken, missing = [np.empty((0, 3, size, size), dtype=np.uint8)], [], count
    while missing and parts:
        sound = []
        for part, quota in zip(parts, _quotas(len(parts), missing, rng), strict=True):
            pixels = _pixels(part) if quota else None
            if pixels is not None:
                pieces.append(_crop(pixels, int(quota), size, rng))
                missing -= int(quota)
            if quota and pixels is None:
                broken.append(part.picture)
            else:
                sound.append(part)
        parts = sound
    return torch.from_numpy(np.concatenate(pieces)), broken


def _pixels(part: _Part) -> UInt8[np.ndarray, "height width 3"] | None:
    """The part's RGB bytes; None: the file is damaged."""
    try:
        with part.picture.open() as image:
            rgb = image.convert("RGB")
    except UNREADABLE:
        return None
    if part.scale != 1:
        # cut before the filter mixes what lies on either side of the cut
        first, end = _columns(rgb.width, part.columns)
        rgb = rgb.resize(
            part.size(*rgb.size), Image.Resampling.BICUBIC, (first, 0, end, rgb.height)
        )
        return np.asarray(rgb)
    first, end = _columns(rgb.width, part.columns)
    return np.asarray(rgb)[:, first:end]


def _crop(
    pixels: UInt8[np.ndarray, "height width 3"], count: int, size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "crops 3 size size"]:
    """Crops at independent, uniform places."""
    at_every_place = np.lib.stride_tricks.sliding_window_view(pixels, (size, size), axis=(0, 1))
    places = _places(pixels.shape[0], pixels.shape[1], count, size, rng)
    return at_every_place[places[:, 0], places[:, 1]]


def _places(height: int, width: int, count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Top and left of so many crops, (count, 2)."""
    tops = rng.integers(height - size + 1, size=count)
    return np.stack([tops, rng.integers(width - size + 1, size=count)], axis=1)
