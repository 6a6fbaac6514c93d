"""From an encoded picture to upright 8-bit RGB, in bounded memory.

Pictures may be anybody's. Damaged bytes are no pixels, whatever a decoder raises at them, and a
picture of too many pixels is never decoded. A file that can't be read now is not damaged: it is an
error, because without it the data set would be another one.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from simvq_moe.data.held_out import stream_key
from simvq_moe.data.media.pictures import (
    Encoded,
    NoPictureError,
    Picture,
    TooLargeError,
    open_image,
)
from simvq_moe.files.regular import BrokenFileError

MOST_PIXELS = 89_478_485
"""Pixels of a picture at most, as it is or resized: above it Pillow too warns of a bomb. To decode
one takes about a gigabyte at most."""
SIDEWAYS = (5, 6, 7, 8)
"""Orientations (EXIF 2.32, tag 274) of a picture whose width and height are exchanged."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of each orientation upright; 1 is upright."""
BITS_PER_SAMPLE = 258
"""Tag of a TIFF."""

Result = TypeVar("Result")


class Header(NamedTuple):
    """What is known of a picture before its pixels are read."""

    width: int
    """Upright."""
    height: int
    key: str
    """Equal for equal contents, see `held_out`."""


class Cut(NamedTuple):
    """The part of a picture that is used, and the size that it is resized to."""

    left: int
    """First column; all rows are used."""
    right: int
    """The column after the last."""
    width: int
    """After resizing."""
    height: int


class PixelBudget:
    """Lets threads hold so many pixels together; one that wants more gets all of them."""

    def __init__(self, pixels: int = MOST_PIXELS) -> None:
        self.pixels = self.free = pixels
        self.changed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until so many pixels are free, and take them for a while."""
        taken = min(pixels, self.pixels)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= taken)
            self.free -= taken
        try:
            yield
        finally:
            with self.changed:
                self.free += taken
                self.changed.notify_all()


def header(picture: Picture) -> Header | Literal["unreadable", "too large"]:
    """Upright size and content key; reads no pixels.

    Raises:
        BrokenFileError: the file can't be read now.
    """
    try:
        return _decoded(picture, _header) or "unreadable"
    except TooLargeError:
        return "too large"


def rgb(
    picture: Picture, cut: Callable[[int, int], Cut]
) -> UInt8[np.ndarray, "height width 3"] | None:
    """Pixels of a part of a picture; None: it is damaged, or too large.

    Args:
        cut: the part, of a picture of upright width and height. No pixel beside it takes part when
            it is resized.

    Raises:
        BrokenFileError: the file can't be read now.
    """
    try:
        return _decoded(picture, lambda image, _: _part(image, cut))
    except TooLargeError:
        return None


def _header(image: Image.Image, file: Encoded) -> Header:
    width, height = image.size
    # Pillow gives the size of a TIFF upright
    if image.format != "TIFF" and _orientation(image) in SIDEWAYS:
        width, height = height, width
    return Header(width, height, stream_key(file))


def _part(
    image: Image.Image, cut: Callable[[int, int], Cut]
) -> UInt8[np.ndarray, "height width 3"]:
    image.load()
    turn = UPRIGHT.get(_orientation(image))
    upright = image if turn is None else image.transpose(turn)
    left, right, *size = cut(*upright.size)
    check_pixels(*size)
    part = eight_bits(upright).crop((left, 0, right, upright.height)).convert("RGB")
    if part.size != tuple(size):
        part = part.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    return np.asarray(part)


def check_pixels(width: int, height: int) -> None:
    """Raise `TooLargeError` for more pixels than are decoded, ValueError for none."""
    if min(width, height) < 1:
        raise ValueError(f"{width} x {height} pixels")
    if width * height > MOST_PIXELS:
        raise TooLargeError(f"{width} x {height} pixels are more than {MOST_PIXELS:,}")


def eight_bits(image: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel; one that has them already comes back as it is.

    White is 65,535 for integers, 4,095 in a TIFF of 12 bits, and 1 for floats.

    Raises:
        ValueError: there are values beyond black or white.
    """
    # what it says of transparent colours is not used, and Pillow warns of some of it
    image.info.pop("transparency", None)
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
        return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    white = {"I": 65_535, "F": 1}.get(image.mode)
    if white is None:
        return image
    least, most = image.getextrema()
    assert isinstance(least, int | float)
    assert isinstance(most, int | float)
    if not (least >= 0 and most <= white):  # nor a NaN
        raise ValueError(f"grey from {least} to {most}, where white should be {white}")
    if image.mode == "I":
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.point(lambda value: value * 255 + 0.5).convert("L")


def _orientation(image: Image.Image) -> int:
    """The orientation in EXIF, 1 to 8; 1 where it says nothing that can be read."""
    try:
        # the method of a PNG's own class would decode pixels in search of a late tag
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's readers have no common error; the pixels may be whole
        return 1


def _decoded(picture: Picture, read: Callable[[Image.Image, Encoded], Result]) -> Result | None:
    """What is read of an opened picture; None: it is damaged, or a row without one."""
    try:
        file = picture.stream()
    except NoPictureError:
        return None
    try:
        with file, open_image(file) as image:
            check_pixels(*image.size)
            return read(image, file)
    except TooLargeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(str(error)) from None
    except Exception as error:  # Pillow's decoders raise anything at damaged bytes
        # only the system numbers its errors; it calls a place before the start of a file invalid
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            reason = f"can't be read now: {error.strerror}: make it readable, or take it out"
            raise BrokenFileError(picture.where, reason) from None
        return None
