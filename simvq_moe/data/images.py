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
import itertools
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from simvq_moe.data.held_out import held_out_by_content
from simvq_moe.data.media.pictures import PHOTOS, REMEDY, Picture, files, hub_name, pictures
from simvq_moe.data.media.pixels import MOST_PIXELS, Cut, Header, PixelBudget, header, rgb
from simvq_moe.data.order import Indices
from simvq_moe.data.rows.saved_sets import is_saved_set, own_splits
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import is_told, printable

__all__ = ["PHOTOS", "ImageCrops", "LazyCrops", "check_source", "image_crops"]

LEFT_SHARE = 0.82
"""Share of an image's width that training sees, where every image is split left and right."""
FILES_TO_SPLIT_BY_FILE = 20
"""From this many different images on, whole files are held out instead."""
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
    header: Header
    columns: Literal["all", "left", "right"]
    scale: float
    """Of its height and width before cropping."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height to draw from."""
        cut = self.cut(self.header.width, self.header.height)
        return cut.width, cut.height

    @property
    def pixels(self) -> int:
        """That are in memory when it is decoded."""
        return self.header.width * self.header.height + prod(self.size)

    def cut(self, width: int, height: int) -> Cut:
        """What of a picture of that size is drawn from."""
        border = int(LEFT_SHARE * width)
        columns = {"all": (0, width), "left": (0, border), "right": (border, width)}
        left, right = columns[self.columns]
        return Cut(left, right, round((right - left) * self.scale), round(height * self.scale))


class LazyCrops:
    """A fixed set of square RGB crops, decoded when a batch asks for them.

    Crops that were decoded are kept as bytes until `memory` of them are; the others are decoded
    again, by threads, which together hold no more pixels than one image may have. What a damaged
    image would have given comes from the image after it.

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
        self.budget = PixelBudget()

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
        """Differs when the images' contents or the places of the crops differ."""
        found = hashlib.blake2b(self.places.tobytes() + self.part_of.tobytes(), digest_size=16)
        for part in self.parts:
            found.update(f"{part.header.key}/{part.columns}/{part.scale}\n".encode())
        return found.hexdigest()

    def _crop(self, index: int) -> UInt8[np.ndarray, "3 size size"]:
        if index in self.kept:
            return self.kept[index]
        first = int(self.part_of[index])
        for step in range(len(self.parts)):
            number = (first + step) % len(self.parts)
            crop = None if number in self.broken else self._crop_of(number, index)
            if crop is None:
                self._report(number)
                continue
            if len(self.kept) < self.room:
                self.kept[index] = crop
            return crop
        raise ConfigError(
            f"data.source: all {len(self.parts)} images are damaged, such as "
            f"{printable(self.parts[0].picture.where)}: give others"
        )

    def _crop_of(self, number: int, index: int) -> UInt8[np.ndarray, "3 size size"] | None:
        """A crop of a part at a place, or near it where the part is smaller; None: it is damaged.

        A copy, so that the rest of the image is let go.
        """
        part = self.parts[number]
        with self.budget.hold(part.pixels):
            pixels = _pixels(part, self.size)
            if pixels is None:
                return None
            top, left = np.minimum(self.places[index], np.array(pixels.shape[:2]) - self.size)
            crop = pixels[top : top + self.size, left : left + self.size]
            return np.array(crop.transpose(2, 0, 1), order="C")

    def _report(self, number: int) -> None:
        if number not in self.broken:
            self.broken.add(number)
            if is_told(len(self.broken)):
                name = self.parts[number].picture.name
                log.warning("skipped damaged image %d: %s", len(self.broken), printable(name))


class _Split(NamedTuple):
    train: list[_Part]
    held_out: list[_Part]
    unreadable: list[Picture]
    small: list[_Part]
    """Whole images that are smaller than they must be."""
    least: tuple[int, int]
    """Width and height that an image must have, after it is resized."""
    too_large: list[Picture]

    def and_held_out(self, other: _Split, train: list[_Part]) -> _Split:
        """These training parts, and all of the other source as the held-out side."""
        return self._replace(
            train=train,
            held_out=other.train,
            unreadable=self.unreadable + other.unreadable,
            small=self.small + other.small,
            too_large=self.too_large + other.too_large,
        )

    def why_so_few(self) -> str:
        """The end of an error's sentence: how many are too small; empty: none is."""
        return f"; {len(self.small)} are {self.too_small()}" if self.small else ""

    def too_small(self) -> str:
        """What the small ones are, and would have to be; there is one."""
        width, height = max((part.size for part in self.small), key=min)
        wide, high = self.least
        halves = ", because few images are each cut into a left and a held-out right part"
        return (
            f"images smaller than {wide} x {high} pixels{halves if wide > high else ''} (the "
            f"largest of them: {width} x {height})"
        )


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
        source: "photos", a folder that is searched for images with all its subfolders, one that
            `datasets` has saved, or "hf:NAME[:SPLIT]" or "hf-stream:NAME[:SPLIT]", a data set of
            the Hub.
        size: pixels a side.
        crops: number of training crops, equally many from each image.
        held_out_crops: number of held-out crops, likewise.
        seed: of the places of the crops.
        held_out_source: what held-out crops are drawn from; None: the held-out split of `source`
            where it was saved with splits, else a part of it.
        shorter_side: pixels that the shorter side of every image is resized to before it is
            cropped; 0: images are cropped as they are.
        memory: bytes of decoded crops; a set that needs more is decoded batch by batch.

    Raises:
        ConfigError: a source doesn't exist, or holds no image that is readable and large enough.
    """
    wanted = crops + held_out_crops
    source, held_out_source = own_splits(source, held_out_source)
    split = _split(source, size, shorter_side, wanted, whole=held_out_source is not None)
    if held_out_source is not None:
        other = _split(held_out_source, size, shorter_side, held_out_crops, whole=True)
        train = _not_among(split.train, other.train, source, held_out_source)
        split = split.and_held_out(other, train)
    sides = ((split.train, crops, 0), (split.held_out, held_out_crops, 1))
    room = memory // max(1, 3 * size * size)
    sets: list[ImageCrops | LazyCrops] = []
    unreadable = list(split.unreadable)
    for parts, count, side in sides:
        rng = np.random.default_rng([seed, side])
        if count > room and parts:
            sets.append(_lazy(parts, count, size, rng, memory))
        else:
            drawn, broken = _draw(parts, count, size, rng)
            unreadable += broken
            sets.append(ImageCrops(drawn))
    _warn(source, "unreadable images", unreadable)
    if split.small:
        _warn(source, split.too_small(), [part.picture for part in split.small])
    _warn(source, f"images of more than {MOST_PIXELS:,} pixels", split.too_large)
    if len(sets[0]) < crops or len(sets[1]) < held_out_crops:
        raise ConfigError(
            f"data.source {source!r} holds no image that is readable and large enough for "
            f"data.image_size {size}: lower it, set data.shorter_side, or give more or larger "
            "images; a few images are each cut in two, and the right part, which is held out, is "
            f"narrow{split.why_so_few()}"
        )
    return sets[0], sets[1]


def check_source(source: str, held_out_source: str | None = None) -> None:
    """Make sure that there is an image; stops at the first and reads no pixels.

    Raises:
        ConfigError: a source doesn't exist, or holds no image.
    """
    source, held_out_source = own_splits(source, held_out_source)
    for one in (source, *([] if held_out_source is None else [held_out_source])):
        name = hub_name(one)
        if name is None:
            some = pictures(one, 1) if is_saved_set(one) else files(one)
            found = any(isinstance(header(picture), Header) for picture in some)
        else:
            found = bool(name)
        if not found:
            raise ConfigError(f"data.source {one!r} holds no readable image: {REMEDY}")


def _split(source: str, size: int, shorter_side: int, limit: int, *, whole: bool) -> _Split:
    """What training and held-out crops are drawn from, and the images that can't be used.

    Files that neither are images nor are named like one (a README) are passed over in silence.
    """
    found = pictures(source, limit)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        headers = list(threads.map(header, found))
    parts = [
        _Part(picture, known, "all", shorter_side / min(known[:2]) if shorter_side else 1.0)
        for picture, known in zip(found, headers, strict=True)
        if isinstance(known, Header)
    ]
    too_large = {part.picture for part in parts if prod(part.size) > MOST_PIXELS}
    too_large |= {p for p, known in zip(found, headers, strict=True) if known == "too large"}
    usable = [p for p in parts if p.picture not in too_large and min(p.size) >= size]
    wide = [part for part in usable if min(part._replace(columns="right").size) >= size]
    contents = len({part.header.key for part in usable})
    least = (size, size)
    if whole:
        train, held_out = usable, []
    elif contents >= FILES_TO_SPLIT_BY_FILE or (len(usable) >= FILES_TO_SPLIT_BY_FILE and not wide):
        train, held_out = _by_content(usable, source)
    else:
        usable = wide
        if len(parts) < FILES_TO_SPLIT_BY_FILE:
            least = (_least_width(size), size)
        train = [part._replace(columns="left") for part in usable]
        held_out = [part._replace(columns="right") for part in usable]
    accounted = {p.picture for p in usable} | too_large
    small = [p for p in parts if p.picture not in accounted]
    skipped = accounted | {part.picture for part in small}
    unreadable = [p for p in found if p not in skipped and p.looks_like_one]
    return _Split(train, held_out, unreadable, small, least, [p for p in found if p in too_large])


def _least_width(size: int) -> int:
    """Of an image whose right part is to be so wide."""
    return next(w for w in itertools.count(size) if w - int(LEFT_SHARE * w) >= size)


def _quotas(parts: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` crops, as equally many from each part as possible."""
    quotas = np.full(parts, count // parts)
    quotas[rng.permutation(parts)[: count % parts]] += 1
    return quotas


def _by_content(parts: list[_Part], source: str) -> tuple[list[_Part], list[_Part]]:
    """Training and held-out images; copies of an image lie on one side."""
    sides = held_out_by_content([part.header.key for part in parts], HELD_OUT_SHARE)
    if not any(sides):
        log.warning(
            "%s: all %d images are equal, and held-out crops are of what training sees: give "
            "others, or data.held_out_source",
            *(printable(source), len(parts)),
        )
        return parts, parts
    train, held_out = (
        [part for part, side in zip(parts, sides, strict=True) if side is right]
        for right in (False, True)
    )
    return train, held_out


def _not_among(
    train: list[_Part], held_out: list[_Part], source: str, held_out_source: str
) -> list[_Part]:
    """Training images without copies of held-out ones: their source may lie inside the other."""
    unseen = {part.header.key for part in held_out}
    kept = [part for part in train if part.header.key not in unseen]
    if train and not kept:
        raise ConfigError(
            f"data.held_out_source {held_out_source!r} holds every image of data.source "
            f"{source!r}: give another one, or drop it"
        )
    if left_out := len(train) - len(kept):
        here, there = printable(source), printable(held_out_source)
        log.info("%s: %d images are in %s as well, and held out", here, left_out, there)
    return kept


def _warn(source: str, what: str, skipped: list[Picture]) -> None:
    if skipped := list(dict.fromkeys(skipped)):
        names = [printable(picture.name.rpartition("/")[2]) for picture in skipped[:NAMED]]
        some = ", ".join(names) + (", ..." if skipped[NAMED:] else "")
        log.warning("%s: skipped %d %s: %s", printable(source), len(skipped), what, some)


def _lazy(
    parts: list[_Part], count: int, size: int, rng: np.random.Generator, memory: int
) -> LazyCrops:
    """The crops that `_draw` would give if no image were damaged."""
    quotas = _quotas(len(parts), count, rng)
    places = [np.empty((0, 2), dtype=np.int64)]
    for part, quota in zip(parts, quotas, strict=True):
        if quota:
            width, height = part.size
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
            pixels = _pixels(part, size) if quota else None
            if pixels is not None:
                pieces.append(_crop(pixels, int(quota), size, rng))
                missing -= int(quota)
            if quota and pixels is None:
                broken.append(part.picture)
            else:
                sound.append(part)
        parts = sound
    return torch.from_numpy(np.concatenate(pieces)), broken


def _pixels(part: _Part, size: int) -> UInt8[np.ndarray, "height width 3"] | None:
    """The part's RGB bytes; None: it is damaged, or smaller than its header said."""
    pixels = rgb(part.picture, part.cut)
    return None if pixels is None or min(pixels.shape[:2]) < size else pixels


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
