"""Whole images in square windows, for what is to see every image once, such as `encode`."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8

from simvq_moe.data.held_out import SHARE
from simvq_moe.data.image_sets import Part, pixels_of
from simvq_moe.data.images import split_sides, warn_skipped
from simvq_moe.data.media.pictures import STREAM
from simvq_moe.data.media.pixels import PixelBudget
from simvq_moe.data.order import Indices, place_of
from simvq_moe.data.rows.saved_sets import own_splits
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import is_told, printable

log = logging.getLogger(__name__)


class ImageWindows:
    """Whole images, in windows of equal size that cover every pixel once, row by row.

    Windows at the right and at the lower edge repeat the image's last column and row beyond it.
    Windows of a damaged image are black, and the log names it.

    Args:
        parts: the images.
        size: pixels a side of a window.
        centres: take of every image one window alone, at its centre.
    """

    def __init__(self, parts: Sequence[Part], size: int, *, centres: bool) -> None:
        self.parts, self.size, self.centres = parts, size, centres
        self.names = [part.picture.name for part in parts]
        whole = np.array([part.size[::-1] for part in parts], dtype=np.int64).reshape(-1, 2)
        self.sizes: Int64[np.ndarray, "images 2"] = np.full_like(whole, size) if centres else whole
        """Height and width of what windows cover."""
        grids = -(-self.sizes // size)
        windows = grids.prod(1)
        self.image_of: Int64[np.ndarray, " windows"] = np.repeat(np.arange(len(parts)), windows)
        """Number of the image of each window."""
        within = np.arange(len(self.image_of)) - np.repeat(np.cumsum(windows) - windows, windows)
        columns = grids[self.image_of, 1]
        self.places: Int64[np.ndarray, "windows 2"] = size * np.stack(
            [within // columns, within % columns], axis=1
        )
        """Top and left of each window within its image."""
        self.damaged: set[int] = set()
        self.budget = PixelBudget()
        self._last: tuple[int, UInt8[np.ndarray, "height width 3"] | None] = (-1, None)
        self.threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1))

    def __len__(self) -> int:
        return len(self.image_of)

    def batch(self, indices: Indices) -> Float32[torch.Tensor, "batch 3 size size"]:
        """The windows named by indices, with the bytes 0 to 255 as -1 to 1."""
        numbers = np.asarray(indices)
        images = self.image_of[numbers]
        last = int(images[-1]) if len(images) else -1
        windows = np.zeros((len(numbers), self.size, self.size, 3), dtype=np.uint8)

        def cut(image: int) -> None:
            with self.budget.hold(self.parts[image].pixels):
                pixels = self._image(image, keep=image == last)
                if pixels is None:
                    return
                for i in np.flatnonzero(images == image):
                    windows[i] = self._window(pixels, *self.places[numbers[i]].tolist())

        list(self.threads.map(cut, dict.fromkeys(images.tolist())))
        return torch.from_numpy(windows.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1

    def digest(self) -> str:
        """Differs when the images or the windows differ."""
        found = hashlib.blake2b(self.places.tobytes() + self.image_of.tobytes(), digest_size=16)
        # places do not say it where each window holds a whole image
        found.update(f"windows of {self.size}\n".encode())
        for part in self.parts:
            found.update(f"{part.header.key}/{part.columns}/{part.scale}\n".encode())
        return found.hexdigest()

    def _image(self, number: int, *, keep: bool) -> UInt8[np.ndarray, "height width 3"] | None:
        """Pixels of an image; a batch keeps its last one, because the next may go on with it."""
        known, pixels = self._last
        if known != number:
            pixels = pixels_of(self.parts[number], 1)
        if pixels is None:
            self._report(number)
        if keep:
            self._last = (number, pixels)
        return pixels

    def _report(self, number: int) -> None:
        if number not in self.damaged:
            self.damaged.add(number)
            if is_told(len(self.damaged)):
                where = printable(self.parts[number].picture.where)
                log.warning("damaged image, whose windows are black: %s", where)

    def _window(
        self, pixels: UInt8[np.ndarray, "height width 3"], top: int, left: int
    ) -> UInt8[np.ndarray, "size size 3"]:
        height, width = pixels.shape[:2]
        if self.centres:
            top, left = max(0, height - self.size) // 2, max(0, width - self.size) // 2
        rows, columns = np.arange(top, top + self.size), np.arange(left, left + self.size)
        return pixels[np.minimum(rows, height - 1)[:, None], np.minimum(columns, width - 1)]


def image_windows(
    source: str, *, size: int, held_out_source: str | None = None, shorter_side: int = 0
) -> tuple[ImageWindows, ImageWindows]:
    """Both sides of `source` whole; the sides are those of `images.image_crops`.

    Images that are smaller than a window are on one of them as well. Where the shorter side of an
    image is resized to that of a window, each image is one window: its centre.

    Args:
        source: see `image_crops`, as all others.
        size: pixels a side of a window.

    Raises:
        ConfigError: a source doesn't exist, or there is no image for one of the sides.
    """
    source, held_out_source = own_splits(source, held_out_source)
    for name in (source, held_out_source or ""):
        if name.startswith(STREAM):
            raise ConfigError(
                f"data.source {name!r} is a stream, whose images are not known before it ends: use "
                "hf: in place of hf-stream:, or --crops"
            )
    whole = held_out_source is not None
    train, held_out, why = _sides(source, size, shorter_side, whole=whole)
    if held_out_source is not None:
        held_out, _, _ = _sides(held_out_source, size, shorter_side, whole=True)
        unseen = {part.header.key for part in held_out}
        train = [part for part in train if part.header.key not in unseen]
    for parts, name in ((train, "training"), (held_out, "held out")):
        if not parts:
            raise ConfigError(
                f"data.source {source!r} has no image that is {name}: give more images, or larger "
                f"ones, which are cut into a left and a narrow held-out right part{why}"
            )
    centres = shorter_side == size
    return ImageWindows(train, size, centres=centres), ImageWindows(held_out, size, centres=centres)


def _sides(
    source: str, size: int, shorter_side: int, *, whole: bool
) -> tuple[list[Part], list[Part], str]:
    """Both sides, and what to say of images that are smaller than a window."""
    split = split_sides(source, size, shorter_side, 2**62, whole=whole)
    train, held_out = list(split.train), list(split.held_out)
    for small in split.small:
        late = not whole and place_of(small.header.key) < SHARE
        (held_out if late else train).append(small)
    warn_skipped(source, "unreadable images", split.unreadable)
    warn_skipped(source, "too large images", split.too_large)
    return train, held_out, split.why_so_few()
