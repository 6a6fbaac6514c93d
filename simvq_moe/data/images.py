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

import itertools
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import NamedTuple

import numpy as np

from simvq_moe.data.held_out import FEWEST, SHARE, held_out_by_content
from simvq_moe.data.image_sets import (
    LEFT_SHARE,
    ImageCrops,
    LazyCrops,
    Part,
    drawn_crops,
    lazy_crops,
)
from simvq_moe.data.media.pictures import REMEDY, Picture, files, hub_name, pictures
from simvq_moe.data.media.pixels import MOST_PIXELS, Header, header
from simvq_moe.data.rows.saved_sets import is_saved_set, own_splits
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import printable

NAMED = 5
"""Images that a warning names; the rest are counted."""

log = logging.getLogger(__name__)


class Split(NamedTuple):
    train: list[Part]
    held_out: list[Part]
    unreadable: list[Picture]
    small: list[Part]
    """Whole images that are smaller than they must be."""
    least: tuple[int, int]
    """Width and height that an image must have, after it is resized."""
    too_large: list[Picture]

    def and_held_out(self, other: Split, train: list[Part]) -> Split:
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
    split = split_sides(source, size, shorter_side, wanted, whole=held_out_source is not None)
    if held_out_source is not None:
        other = split_sides(held_out_source, size, shorter_side, held_out_crops, whole=True)
        train = _not_among(split.train, other.train, source, held_out_source)
        split = split.and_held_out(other, train)
    sides = ((split.train, crops, 0), (split.held_out, held_out_crops, 1))
    room = memory // max(1, 3 * size * size)
    sets: list[ImageCrops | LazyCrops] = []
    unreadable = list(split.unreadable)
    for parts, count, side in sides:
        rng = np.random.default_rng([seed, side])
        if count > room and parts:
            sets.append(lazy_crops(parts, count, size, rng, memory))
        else:
            drawn, broken = drawn_crops(parts, count, size, rng)
            unreadable += broken
            sets.append(ImageCrops(drawn))
    warn_skipped(source, "unreadable images", unreadable)
    if split.small:
        warn_skipped(source, split.too_small(), [part.picture for part in split.small])
    warn_skipped(source, f"images of more than {MOST_PIXELS:,} pixels", split.too_large)
    if len(sets[0]) < crops or len(sets[1]) < held_out_crops:
        cut = "; a few images are each cut in two, and the right part, which is held out, is narrow"
        raise ConfigError(
            f"data.source {source!r} holds no image that is readable and large enough for "
            f"data.image_size {size}: lower it, set data.shorter_side, or give more or larger "
            f"images{cut if split.train else ''}{split.why_so_few()}"
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


def split_sides(source: str, size: int, shorter_side: int, limit: int, *, whole: bool) -> Split:
    """What training and held-out crops are drawn from, and the images that can't be used.

    Files that neither are images nor are named like one (a README) are passed over in silence.
    """
    found = pictures(source, limit)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        headers = list(threads.map(header, found))
    parts = [
        Part(picture, known, "all", shorter_side / min(known[:2]) if shorter_side else 1.0)
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
    elif contents >= FEWEST or (len(usable) >= FEWEST and not wide):
        train, held_out = _by_content(usable, source)
    else:
        usable = wide
        if len(parts) < FEWEST:
            least = (_least_width(size), size)
        train = [part._replace(columns="left") for part in usable]
        held_out = [part._replace(columns="right") for part in usable]
    accounted = {p.picture for p in usable} | too_large
    small = [p for p in parts if p.picture not in accounted]
    skipped = accounted | {part.picture for part in small}
    unreadable = [p for p in found if p not in skipped and p.looks_like_one]
    return Split(train, held_out, unreadable, small, least, [p for p in found if p in too_large])


def _least_width(size: int) -> int:
    """The least width of an image whose right part is to be so wide."""
    return next(w for w in itertools.count(size) if w - int(LEFT_SHARE * w) >= size)


def _by_content(parts: list[Part], source: str) -> tuple[list[Part], list[Part]]:
    """Training and held-out images; copies of an image lie on one side."""
    sides = held_out_by_content([part.header.key for part in parts], SHARE)
    if not any(sides):
        log.warning(
            "%s: all %d images are equal, and held-out crops are of what training sees: give "
            "others, or data.held_out_source",
            printable(source),
            len(parts),
        )
        return parts, parts
    train, held_out = (
        [part for part, side in zip(parts, sides, strict=True) if side is right]
        for right in (False, True)
    )
    return train, held_out


def _not_among(
    train: list[Part], held_out: list[Part], source: str, held_out_source: str
) -> list[Part]:
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


def warn_skipped(source: str, what: str, skipped: list[Picture]) -> None:
    if skipped := list(dict.fromkeys(skipped)):
        names = [printable(picture.name.rpartition("/")[2]) for picture in skipped[:NAMED]]
        some = ", ".join(names) + (", ..." if skipped[NAMED:] else "")
        log.warning("%s: skipped %d %s: %s", printable(source), len(skipped), what, some)
