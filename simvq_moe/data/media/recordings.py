"""One recording: what its header says, and any stretch of its samples at any rate.

What is held at a time is one piece, whatever a recording's length and number of channels. A piece
is the same samples whether a recording is read from its start or from its middle, to one step of
16 bits where a decoder remembers what it read before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from jaxtyping import Float64, Int16

from simvq_moe.files.regular import BrokenFileError

UNREADABLE = (OSError, RuntimeError, TypeError, ValueError)
"""What soundfile raises for files that are damaged, headerless or no recordings."""
FULL_SCALE = 32_768
"""16-bit value of the amplitude 1."""
FILTER_ZEROS = 10
"""Samples of the lower rate that the resampling filter reaches to either side, scipy's choice."""
RATES = range(100, 768_001)
"""Hz of recordings: what is outside comes from broken headers, and filters for it fill memory."""
BLOCK = 2**18
"""Samples of all channels together that are decoded at a time."""
MOST_FRAMES_A_BYTE = 8_192
"""A header that promises more is not believed: coded silence has up to 4,700 (FLAC)."""
RUN_IN = 65_536
"""Frames that are decoded before the first wanted one, where a decoder remembers: 113 short frames
of MP3, whose bits may lie 255 bytes back, 3 bytes a frame; the state of Opus fades in 0.1 s."""
FORGETFUL = {
    *("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"),
    *("ALAC_16", "ALAC_20", "ALAC_24", "ALAC_32"),
}
"""Encodings that are decoded alike from anywhere; FLAC is one of the first."""


class Part(NamedTuple):
    """Frames of a recording, at its own rate."""

    path: Path
    first: int
    end: int
    rate: int
    key: str = ""
    """Equal for files of equal content."""

    def samples(self, rate: int) -> int:
        """How many samples at `rate` it gives."""
        return -(-(self.end - self.first) * rate // self.rate)

    def places(self, rate: int, length: int) -> int:
        """How many clips of `length` samples at `rate` begin in it, 0 or fewer if it is short."""
        return self.samples(rate) - length + 1


class _Forward(soundfile.SoundFile):
    """A file that is read on and on.

    soundfile seeks after every read of a seekable file, which makes decoders forget, and fails at
    the end of a file that is shorter than its header says.
    """

    @classmethod
    def of(cls, path: Path) -> _Forward:
        # a name is bytes: as text, one that is not UTF-8 could not be handed on
        return cls(os.fsencode(path))  # pyright: ignore[reportArgumentType]

    def seekable(self) -> bool:
        return False


def header(path: Path) -> Part | None:
    """A whole recording; None: libsndfile can't open the file.

    A length that the header lacks, or that no file of that size can have, is counted.

    Raises:
        BrokenFileError: the file can't be read now.
    """
    try:
        with _Forward.of(path) as file:
            frames, rate = file.frames, file.samplerate
        believable = frames <= path.stat().st_size * MOST_FRAMES_A_BYTE
    except UNREADABLE:
        check_readable(path)
        return None
    return Part(path, 0, frames if believable else frames_there(path), rate)


def frames_there(path: Path) -> int:
    """The frames that can be decoded, whatever the header says.

    Raises:
        BrokenFileError: the file can't be read now.
    """
    found = 0
    try:
        for block in _blocks(path, 0, None):
            found += len(block)
    except UNREADABLE:
        check_readable(path)
    return found


def piece(part: Part, first: int, end: int, rate: int) -> Int16[np.ndarray, " time"] | None:
    """Samples `first` to `end` of the part at `rate` Hz, all channels averaged.

    Fewer where the part ends before, or the file is shorter than its header says; None: what would
    decide them is damaged.

    Raises:
        BrokenFileError: the file can't be read now.
    """
    if end <= first:
        return np.empty(0, dtype=np.int16)
    wanted, before = _around(part, first, rate, end - first)
    try:
        blocks = list(_blocks(part.path, wanted.first, wanted.end))
    except UNREADABLE:
        check_readable(part.path)
        return None
    frames = np.concatenate([np.empty(0), *blocks])
    if len(frames) < wanted.end - wanted.first:
        check_readable(part.path)
    with np.errstate(over="ignore", invalid="ignore"):
        samples = resample(frames, part.rate, rate)[before : before + end - first]
    if not np.isfinite(samples).all():
        return None
    return np.clip(np.rint(samples * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


def check_readable(path: Path) -> None:
    """Tell a disk, a network or permissions that fail from a damaged recording.

    Raises:
        BrokenFileError: the file can't be read now.
    """
    try:
        with path.open("rb") as file:
            while file.read(2**20):
                pass
    except OSError as error:
        raise BrokenFileError(
            path,
            f"can't be read now ({error.strerror or error}): make it readable, or take it out of "
            "the folder, and start again",
        ) from None


def resample(
    samples: Float64[np.ndarray, " time"], source_rate: int, rate: int
) -> Float64[np.ndarray, " resampled"]:
    """Samples at another rate in Hz, by a polyphase filter without delay; at the same rate as is.

    Frequencies above half of the lower rate are filtered out.
    """
    if source_rate == rate or not len(samples):
        return samples
    # slow to import, and needed by no other task
    from scipy.signal import resample_poly

    common = int(np.gcd(source_rate, rate))
    up, down = rate // common, source_rate // common
    found = resample_poly(samples, up, down, window=_filter(max(up, down)))
    return np.asarray(found)


@lru_cache(maxsize=8)
def _filter(longer: int) -> Float64[np.ndarray, " taps"]:
    """scipy's default for this ratio, which it would design anew for every clip."""
    from scipy.signal import firwin

    window: Any = ("kaiser", 5.0)  # its stub knows names alone
    return np.asarray(firwin(2 * FILTER_ZEROS * longer + 1, 1 / longer, window=window))


def _around(part: Part, place: int, rate: int, length: int) -> tuple[Part, int]:
    """The frames that decide the clip at `place`, and its place among their samples alone."""
    common = int(np.gcd(part.rate, rate))
    up, down = rate // common, part.rate // common
    reach = FILTER_ZEROS * max(up, down) if up != down else 0
    # samples of both rates coincide at multiples of `down`
    first = max(0, (place * down - reach) // up // down * down)
    end = min(part.end - part.first, ((place + length - 1) * down + reach) // up + 1)
    frames = part._replace(first=part.first + first, end=part.first + max(first, end))
    return frames, place - first // down * up


def _blocks(path: Path, first: int, end: int | None) -> Iterator[Float64[np.ndarray, " time"]]:
    """Frames from first to end (None: to the last), averaged over channels, a block at a time."""
    file, place = _open_before(path, first)
    with file:
        frames = max(1, BLOCK // file.channels)
        while end is None or place < end:
            count = frames if end is None else min(frames, end - place)
            block = file.read(count, dtype="float64", always_2d=True)
            if not len(block):
                return
            with np.errstate(over="ignore", invalid="ignore"):
                yield block[max(0, first - place) :].mean(1)
            place += len(block)


def _open_before(path: Path, first: int) -> tuple[soundfile.SoundFile, int]:
    """The file at a place from which decoding gives frame `first` right, and that place.

    That is its start where it is near, or where the encoding knows no seeking.
    """
    file = _Forward.of(path)
    place = first if file.subtype in FORGETFUL else max(0, first - RUN_IN)
    if not place:
        return file, 0
    try:
        return file, file.seek(place)
    except UNREADABLE:
        file.close()
        return _Forward.of(path), 0
