"""Sets of square crops of pictures: in memory, or decoded batch by batch; the crops are equal."""

from __future__ import annotations

import hashlib
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

from simvq_moe.data.media.pictures import Picture
from simvq_moe.data.media.pixels import Cut, Header, PixelBudget, rgb
from simvq_moe.data.order import Indices
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import is_told, printable

LEFT_SHARE = 0.82
"""Share of an image's width that training sees, where every image is split left and right."""

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


class Part(NamedTuple):
    """The columns of an image that one side of the split draws from."""

    picture: Picture
    header: Header
    columns: Literal["all", "left", "right"]
    scale: float
    """Factor of its height and width before cropping."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height to draw from."""
        cut = self.cut(self.header.width, self.header.height)
        return cut.width, cut.height

    @property
    def pixels(self) -> int:
        """Pixels that are in memory when it is decoded."""
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
        parts: Sequence[Part],
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
            pixels = pixels_of(part, self.size)
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


def lazy_crops(
    parts: list[Part], count: int, size: int, rng: np.random.Generator, memory: int
) -> LazyCrops:
    """The crops that `drawn_crops` would give if no image were damaged."""
    quotas = _quotas(len(parts), count, rng)
    places = [np.empty((0, 2), dtype=np.int64)]
    for part, quota in zip(parts, quotas, strict=True):
        if quota:
            width, height = part.size
            places.append(_places(height, width, int(quota), size, rng))
    return LazyCrops(parts, quotas, np.concatenate(places).astype(np.int32), size, memory)


def drawn_crops(
    parts: list[Part], count: int, size: int, rng: np.random.Generator
) -> tuple[UInt8[Tensor, "crops 3 size size"], list[Picture]]:
    """`count` crops, as equally many from each part as possible, and the images that broke.

    What a damaged image would have given is drawn from the others. Fewer crops than asked for
    come back only if every image is damaged.
    """
    pieces, broken, missing = [np.empty((0, 3, size, size), dtype=np.uint8)], [], count
    while missing and parts:
        sound = []
        for part, quota in zip(parts, _quotas(len(parts), missing, rng), strict=True):
            pixels = pixels_of(part, size) if quota else None
            if pixels is not None:
                pieces.append(_crop(pixels, int(quota), size, rng))
                missing -= int(quota)
            if quota and pixels is None:
                broken.append(part.picture)
            else:
                sound.append(part)
        parts = sound
    return torch.from_numpy(np.concatenate(pieces)), broken


def pixels_of(part: Part, size: int) -> UInt8[np.ndarray, "height width 3"] | None:
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


def _quotas(parts: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` crops, as equally many from each part as possible."""
    quotas = np.full(parts, count // parts)
    quotas[rng.permutation(parts)[: count % parts]] += 1
    return quotas
