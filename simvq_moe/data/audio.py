"""Mono clips at random places of recordings, as 16-bit samples.

"spoken-characters" are the 36 spoken digits and letters that the wheel of captcha ships, 19.5 s at
8 kHz, so that a fresh machine trains on recorded speech without a download. "asterisk" are the
568 prompts of Debian's asterisk-core-sounds-en-wav, 25 minutes at 8 kHz. Any other source is a
folder of what libsndfile reads. Held-out clips come from other files, or, where files are few,
from the end of every recording: no sample of them is ever seen in training.

A set that fits into memory is read and resampled once (`AudioClips`), of a larger one each batch
reads what it needs (`LazyClips`); the clips are the same.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import soundfile
import torch
from jaxtyping import Float32, Float64, Int16
from torch import Tensor

from simvq_moe.data.order import Indices, held_out_by_name
from simvq_moe.merging import ConfigError

CHARACTERS = "default.wav"
"""Name of each embedded recording, in a folder of its own beside an alarm tone."""
ASTERISK = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
"""Where Debian's package installs its prompts."""
EARLY_SHARE = 0.82
"""Share of a recording that training hears, where every recording is split early and late."""
FILES_TO_SPLIT_BY_FILE = 20
"""From this many recordings on, whole files are held out instead."""
HELD_OUT_SHARE = 0.1
"""Share of the files held out then."""
SUFFIXES = {
    *(".aac", ".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".m4a", ".mp3", ".oga", ".ogg"),
    *(".opus", ".raw", ".snd", ".sph", ".voc", ".w64", ".wav", ".wma"),
}
"""Names of recordings: such a file is named in the log where it can't be used."""
UNREADABLE = (OSError, RuntimeError, TypeError, ValueError)
"""What soundfile raises for files that are damaged, headerless or no recordings."""
FULL_SCALE = 32_768
"""16-bit value of the amplitude 1."""
FILTER_ZEROS = 10
"""Samples of the lower rate that the resampling filter reaches to either side, scipy's choice."""
NAMED = 5
"""Recordings that a warning names; the rest are counted."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AudioClips:
    """A fixed set of clips of equal length."""

    samples: Int16[Tensor, "clips time"]

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Indices) -> Float32[Tensor, "batch time"]:
        """The clips named by indices, in [-1, 1)."""
        return self.samples[torch.tensor(np.asarray(indices))].float() / FULL_SCALE

    def digest(self) -> str:
        """Differs when the clips differ."""
        return hashlib.blake2b(self.samples.numpy().tobytes(), digest_size=16).hexdigest()


class _Part(NamedTuple):
    """The frames of a recording, at its own rate, that one side of the split draws from."""

    path: Path
    first: int
    end: int
    rate: int

    def places(self, rate: int, length: int) -> int:
        """How many clips of `length` samples at `rate` begin in it, 0 or fewer if it is short."""
        return -(-(self.end - self.first) * rate // self.rate) - length + 1


class LazyClips:
    """A fixed set of clips of equal length, read when a batch asks for them.

    Clips that were read are kept until `memory` bytes of them are; the others are read again, by
    threads. What a damaged recording would have given comes from the recording after it.

    Args:
        parts: what is drawn from.
        quotas: clips of each part, which lie one after another.
        places: first sample of every clip within its part, at `rate`.
        rate: Hz.
        length: samples of a clip.
        memory: bytes of clips to keep.
    """

    def __init__(
        self,
        parts: Sequence[_Part],
        quotas: np.ndarray,
        places: np.ndarray,
        rate: int,
        length: int,
        memory: int,
    ) -> None:
        self.parts, self.places, self.rate, self.length = parts, places, rate, length
        self.part_of = np.repeat(np.arange(len(parts)), quotas)
        self.room = memory // (2 * length)
        self.kept: dict[int, Int16[np.ndarray, " time"]] = {}
        self.broken: set[int] = set()
        self.threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1))

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, indices: Indices) -> Float32[Tensor, "batch time"]:
        """The clips named by indices, in [-1, 1)."""
        names = np.asarray(indices).tolist()
        clips = np.empty((len(names), self.length), dtype=np.int16)
        for i, clip in enumerate(self.threads.map(self._clip, names)):
            clips[i] = clip
        return torch.from_numpy(clips).float() / FULL_SCALE

    def digest(self) -> str:
        """Differs when the recordings' names or the places of the clips differ."""
        found = hashlib.blake2b(self.places.tobytes() + self.part_of.tobytes(), digest_size=16)
        for part in self.parts:
            found.update(f"{part.path.name} {part.first} {part.end} {part.rate}\n".encode())
        return found.hexdigest()

    def _clip(self, index: int) -> Int16[np.ndarray, " time"]:
        if index in self.kept:
            return self.kept[index]
        first = int(self.part_of[index])
        for step in range(len(self.parts)):
            number = (first + step) % len(self.parts)
            part = self.parts[number]
            # a shorter recording may stand in for a longer one
            place = min(int(self.places[index]), part.places(self.rate, self.length) - 1)
            frames, place = _around(part, place, self.rate, self.length)
            end = place + self.length
            samples = None if number in self.broken else _samples(frames, self.rate, end)
            if samples is None:
                self._report(number)
                continue
            clip = samples[place:end].copy()
            if len(self.kept) < self.room:
                self.kept[index] = clip
            return clip
        raise ValueError("every recording of the data set is damaged")

    def _report(self, number: int) -> None:
        if number not in self.broken:
            self.broken.add(number)
            some = len(self.broken) <= NAMED
            name = self.parts[number].path.name if some else "and more, which are not named"
            log.warning("skipped damaged recording %d: %s", len(self.broken), name)


class _Split(NamedTuple):
    train: list[_Part]
    held_out: list[_Part]
    skipped: list[Path]


def audio_clips(
    source: str,
    *,
    sample_rate: int,
    length: int,
    clips: int,
    held_out_clips: int,
    seed: int,
    memory: int = 2**32,
) -> tuple[AudioClips | LazyClips, AudioClips | LazyClips]:
    """Training and held-out clips of `source`, the same for the same seed.

    Args:
        source: "spoken-characters", "asterisk", or a folder that is searched for recordings with
            all its subfolders.
        sample_rate: Hz; recordings of another rate are resampled, and all channels averaged.
        length: samples of a clip.
        clips: number of training clips; every place of every recording is equally likely.
        held_out_clips: number of held-out clips, likewise.
        seed: of the places of the clips.
        memory: bytes of clips; a set that needs more is read batch by batch.

    Raises:
        ConfigError: the source doesn't exist, or holds no recording that is readable and long
            enough.
    """
    split = _split(source, sample_rate, length)
    sets: list[AudioClips | LazyClips] = []
    skipped = list(split.skipped)
    for side, (parts, count) in enumerate(((split.train, clips), (split.held_out, held_out_clips))):
        rng = np.random.default_rng([seed, side])
        if 2 * length * count > memory and parts:
            sets.append(_lazy(parts, count, sample_rate, length, rng, memory))
        else:
            samples, broken = _draw(parts, count, sample_rate, length, rng)
            sets.append(AudioClips(samples))
            skipped += broken
    if len(sets[0]) < clips or len(sets[1]) < held_out_clips:
        raise ConfigError(
            f"data.source {source!r} holds no recording that is readable and long enough for "
            f"data.audio_seconds {length / sample_rate:g}: lower it, give longer recordings, of "
            "which few are cut into an early and a short held-out late part each, or "
            "'spoken-characters'"
        )
    if skipped := list(dict.fromkeys(skipped)):
        some = ", ".join(path.name for path in skipped[:NAMED])
        some += ", ..." if skipped[NAMED:] else ""
        log.warning(
            "%s: skipped %d unreadable or too short recordings: %s", source, len(skipped), some
        )
    return sets[0], sets[1]


def check_source(source: str) -> None:
    """Make sure that there is a recording; stops at the first and reads no samples.

    Raises:
        ConfigError: the source doesn't exist, or holds no recording.
    """
    if not any(_header(path) for path in _paths(source)):
        raise ConfigError(
            f"data.source {source!r} holds no readable recording: give a folder of what "
            "libsndfile reads, such as wav or flac, or 'spoken-characters'"
        )


def _root(source: str) -> Path:
    """The file or folder behind a source, which exists."""
    if source == "spoken-characters":
        spec = find_spec("captcha")
        folders = (spec.submodule_search_locations if spec else None) or [""]
        return Path(folders[0], "data")
    root = ASTERISK if source == "asterisk" else Path(source)
    if not root.exists():
        remedy = "give a folder of recordings or 'spoken-characters'"
        if source == "asterisk":
            remedy = "apt-get install asterisk-core-sounds-en-wav, or use 'spoken-characters'"
        raise ConfigError(f"data.source {source!r} does not exist: {remedy}")
    return root


def _paths(source: str) -> list[Path]:
    """Every file that may be a recording, in an order that is the same on every machine."""
    root = _root(source)
    if root.is_file():
        return [root]
    pattern = CHARACTERS if source == "spoken-characters" else "[!.]*"
    return sorted(path for path in root.rglob(pattern) if path.is_file())


def _header(path: Path) -> _Part | None:
    """A whole recording by its header; None: libsndfile can't open the file."""
    try:
        found = soundfile.info(path)
    except UNREADABLE:
        return None
    return _Part(path, 0, found.frames, found.samplerate)


def _split(source: str, rate: int, length: int) -> _Split:
    """What training and held-out clips are drawn from, and the recordings that can't be used.

    Files that neither are recordings nor are named like one (a README) are passed over in silence.
    """
    headers = {path: _header(path) for path in _paths(source)}
    readable = [whole for whole in headers.values() if whole]
    usable = [whole for whole in readable if whole.places(rate, length) > 0]
    if len(usable) >= FILES_TO_SPLIT_BY_FILE:
        names = [whole.path.relative_to(_root(source)).as_posix() for whole in usable]
        sides = held_out_by_name(names, HELD_OUT_SHARE)
        train, held_out = (
            [whole for whole, side in zip(usable, sides, strict=True) if side is late]
            for late in (False, True)
        )
    else:
        usable = [whole for whole in usable if _side(whole, "late").places(rate, length) > 0]
        train = [_side(whole, "early") for whole in usable]
        held_out = [_side(whole, "late") for whole in usable]
    used = {whole.path for whole in usable}
    skipped = [
        path
        for path, whole in headers.items()
        if path not in used and (whole or path.suffix.lower() in SUFFIXES)
    ]
    return _Split(train, held_out, skipped)


def _side(whole: _Part, side: Literal["early", "late"]) -> _Part:
    """One side of a recording that is cut in time, before any filter mixes the two."""
    border = int(EARLY_SHARE * whole.end)
    return whole._replace(end=border) if side == "early" else whole._replace(first=border)


def _lazy(
    parts: list[_Part],
    count: int,
    rate: int,
    length: int,
    rng: np.random.Generator,
    memory: int,
) -> LazyClips:
    """The clips that `_draw` would give if no recording were damaged."""
    room = np.array([part.places(rate, length) for part in parts])
    quotas = rng.multinomial(count, room / room.sum())
    places = [
        rng.integers(n, size=int(quota)) for n, quota in zip(room, quotas, strict=True) if quota
    ]
    return LazyClips(parts, quotas, np.concatenate(places), rate, length, memory)


def _around(part: _Part, place: int, rate: int, length: int) -> tuple[_Part, int]:
    """The frames that decide the clip at `place`, and its place among their samples alone."""
    common = int(np.gcd(part.rate, rate))
    up, down = rate // common, part.rate // common
    reach = FILTER_ZEROS * max(up, down) if up != down else 0
    # samples of both rates coincide at multiples of `down`
    first = max(0, (place * down - reach) // up // down * down)
    end = min(part.end - part.first, ((place + length - 1) * down + reach) // up + 1)
    frames = part._replace(first=part.first + first, end=part.first + end)
    return frames, place - first // down * up


def _draw(
    parts: list[_Part], count: int, rate: int, length: int, rng: np.random.Generator
) -> tuple[Int16[Tensor, "clips time"], list[Path]]:
    """`count` clips at places drawn from all parts together, and the recordings that broke.

    What a damaged recording would have given is drawn from the others. Fewer clips than asked for
    come back only if every recording is damaged.
    """
    pieces, broken, missing = [np.empty((0, length), dtype=np.int16)], [], count
    while missing and parts:
        places = np.array([part.places(rate, length) for part in parts], dtype=np.float64)
        sound = []
        for part, quota in zip(parts, rng.multinomial(missing, places / places.sum()), strict=True):
            samples = _samples(part, rate, length) if quota else None
            if samples is not None:
                at_every_place = np.lib.stride_tricks.sliding_window_view(samples, length)
                pieces.append(at_every_place[rng.integers(len(at_every_place), size=int(quota))])
                missing -= int(quota)
            if quota and samples is None:
                broken.append(part.path)
            else:
                sound.append(part)
        parts = sound
    return torch.from_numpy(np.concatenate(pieces)), broken


def _samples(part: _Part, rate: int, length: int) -> Int16[np.ndarray, " time"] | None:
    """The part at the sample rate; None: the file is damaged, or shorter than its header says."""
    try:
        frames, _ = soundfile.read(part.path, start=part.first, stop=part.end, always_2d=True)
    except UNREADABLE:
        return None
    samples = resample(frames.mean(1), part.rate, rate)
    if len(samples) < length or not np.isfinite(samples).all():
        return None
    return np.clip(np.rint(samples * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


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
    return resample_poly(samples, rate // common, source_rate // common)
