"""Mono clips at random places of recordings, and whole recordings, as 16-bit samples.

"spoken-characters" are the 36 spoken digits and letters that the wheel of captcha ships, 19.5 s at
8 kHz, so that a fresh machine trains on recorded speech without a download. "asterisk" are the
568 prompts of Debian's asterisk-core-sounds-en-wav, 25 minutes at 8 kHz. Any other source is a
folder of what libsndfile reads.

Held-out recordings are of other speakers where paths name speakers (see `speakers`), else other
files, or, where files are few, the end of every recording: no sample of them is ever heard in
training, under no name.

`audio_clips` draws clips, which a small set holds in memory (`AudioClips`) and a larger one reads
batch by batch (`LazyClips`); the clips are the same. `recording_windows` has every sample once, in
windows that follow one another (`RecordingWindows`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from simvq_moe.data.audio_sets import (
    AudioClips,
    LazyClips,
    NothingReadableError,
    RecordingWindows,
    named,
)
from simvq_moe.data.held_out import FEWEST, SHARE, file_key, held_out_by_content
from simvq_moe.data.media.recordings import RATES, Part, check_readable, header, resample
from simvq_moe.data.media.speakers import voices
from simvq_moe.data.order import place_of
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import BrokenFileError, printable

__all__ = [
    "AudioClips",
    "LazyClips",
    "RecordingWindows",
    "audio_clips",
    "check_source",
    "recording_windows",
    "resample",
]

CHARACTERS = "default.wav"
"""Name of each embedded recording, in a folder of its own beside an alarm tone."""
ASTERISK = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
"""Where Debian's package installs its prompts."""
EMBEDDED = ("spoken-characters", "asterisk")
"""Sources that are the same for everyone; names decide what is held out of them, because published
numbers were measured so."""
EARLY_SHARE = 0.82
"""Share of a recording that training hears, where every recording is split early and late."""
SUFFIXES = {
    *(".aac", ".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".m4a", ".mp3", ".oga", ".ogg"),
    *(".opus", ".raw", ".snd", ".sph", ".voc", ".w64", ".wav", ".wma"),
}
"""Names of recordings: such a file is named in the log where it can't be used."""

log = logging.getLogger(__name__)


class _Split(NamedTuple):
    """What is drawn from, on either side, and what can't be used."""

    train: list[Part]
    held_out: list[Part]
    skipped: list[Path]
    """Unreadable or too short."""
    strange: list[Path]
    """Files of an impossible sample rate."""


def audio_clips(
    source: str,
    *,
    sample_rate: int,
    length: int,
    clips: int,
    held_out_clips: int,
    seed: int,
    held_out_source: str | None = None,
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
        held_out_source: what held-out clips are drawn from, whose recordings are not trained on;
            None: a part of `source`.
        memory: bytes of clips; a set that needs more is read batch by batch.

    Raises:
        ConfigError: the source doesn't exist, holds no recording that is readable and long enough,
            or one that can't be read now.
    """
    split = _split_of(source, held_out_source, sample_rate, length)
    sets: list[AudioClips | LazyClips] = []
    skipped, cut = list(split.skipped), []
    try:
        for side, (parts, count) in enumerate(
            ((split.train, clips), (split.held_out, held_out_clips))
        ):
            rng = np.random.default_rng([seed, side])
            drawn = _drawn(parts, count, sample_rate, length, rng, memory)
            if 2 * length * count > memory:
                sets.append(drawn)
            else:
                found, reader = drawn.in_memory()
                sets.append(found)
                skipped += [parts[number].path for number in sorted(reader.broken)]
                cut += [parts[number].path for number in sorted(reader.cut.keys() - reader.broken)]
    except NothingReadableError:
        raise ConfigError(
            f"data.source {source!r} holds no recording that is readable and long enough for "
            f"data.audio_seconds {length / sample_rate:g}: lower it, or give more or longer "
            "recordings; a few recordings are each cut in two, and the late part, which is held "
            "out, is short"
        ) from None
    _warn(source, "skipped %d unreadable or too short recordings", skipped)
    _warn(source, "cut %d recordings that are shorter than their headers say", cut)
    _warn_of_rates(source, split)
    return sets[0], sets[1]


def recording_windows(
    source: str, *, sample_rate: int, length: int, held_out_source: str | None = None
) -> tuple[RecordingWindows, RecordingWindows]:
    """Both sides of `source` whole, for what is to see every sample once, such as `encode`.

    The sides are those of `audio_clips` of that length; recordings that are too short for a clip
    are on one of them as well.

    Args:
        source: see `audio_clips`.
        sample_rate: Hz.
        length: samples of a window.
        held_out_source: see `audio_clips`.

    Raises:
        ConfigError: the source doesn't exist, holds no readable recording, or one that can't be
            read now.
    """
    split = _split_of(source, held_out_source, sample_rate, length, short_ones=True)
    if not split.train:
        raise ConfigError(_no_recording(source))
    roots = (_root(source), _root(held_out_source or source))
    _warn(source, "skipped %d unreadable or empty recordings", split.skipped)
    _warn_of_rates(source, split)
    train, held_out = (
        RecordingWindows(parts, [_name(part.path, root) for part in parts], sample_rate, length)
        for parts, root in zip((split.train, split.held_out), roots, strict=True)
    )
    return train, held_out


def check_source(source: str) -> None:
    """Make sure that there is a recording; stops at the first and reads no samples.

    Raises:
        ConfigError: the source doesn't exist, or holds no recording.
    """
    if not any(_whole(path) for path in _paths(source)):
        raise ConfigError(_no_recording(source))


def _no_recording(source: str) -> str:
    return (
        f"data.source {source!r} holds no readable recording: give a folder of what "
        "libsndfile reads, such as wav or flac, or 'spoken-characters'"
    )


def _warn(source: str, what: str, paths: list[Path]) -> None:
    if paths := list(dict.fromkeys(paths)):
        log.warning(f"%s: {what}: %s", printable(source), len(paths), named(paths))


def _warn_of_rates(source: str, split: _Split) -> None:
    rates = f"{RATES[0]:,} to {RATES[-1]:,} Hz"
    _warn(source, f"skipped %d recordings of sample rates outside {rates}", split.strange)


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


def _name(path: Path, root: Path) -> str:
    """The same on every machine."""
    return path.name if path == root else path.relative_to(root).as_posix()


def _paths(source: str) -> list[Path]:
    """Every file that may be a recording, in an order that is the same on every machine."""
    root = _root(source)
    if root.is_file():
        return [root]
    embedded = source == "spoken-characters"
    return sorted(
        path
        for path in _below(root)
        if (path.name == CHARACTERS if embedded else not path.name.startswith("."))
        and path.is_file()
    )


def _below(root: Path) -> Iterator[Path]:
    """What a folder and its subfolders hold, those behind links as well, each once."""

    def can_not_be_read(error: OSError) -> None:
        raise BrokenFileError(
            str(error.filename),
            f"can't be read now ({error.strerror}): make the folder readable, or take it out",
        )

    seen = set()
    for folder, subfolders, names in os.walk(root, onerror=can_not_be_read, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back, or a second one
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders.sort()
        yield from (Path(folder, name) for name in names)


def _whole(path: Path) -> Part | None:
    """A recording by its header; None: it is none.

    Raises:
        BrokenFileError: it is named like one and can't be read now.
    """
    try:
        return header(path)
    except BrokenFileError:
        if path.suffix.lower() in SUFFIXES:
            raise
        return None


def _keyed(path: Path) -> Part | None:
    whole = _whole(path)
    if whole is None:
        return None
    try:
        return whole._replace(key=file_key(path))
    except OSError:
        check_readable(path)
        return None


def _split_of(
    source: str,
    held_out_source: str | None,
    rate: int,
    length: int,
    *,
    short_ones: bool = False,
) -> _Split:
    """Both sides, of one source or of a source each; recordings of both are held out."""
    whole = held_out_source is not None
    split = _split(source, rate, length, short_ones=short_ones, whole=whole)
    if held_out_source is None:
        return split
    other = _split(held_out_source, rate, length, short_ones=short_ones, whole=True)
    unseen = {part.key for part in other.train}
    train = [part for part in split.train if part.key not in unseen]
    if split.train and not train:
        raise ConfigError(
            f"data.held_out_source {held_out_source!r} holds every recording of data.source "
            f"{source!r}: give another one, or drop it"
        )
    if not other.train:
        raise ConfigError(
            f"data.held_out_source {held_out_source!r} holds no recording that is readable and "
            f"long enough for data.audio_seconds {length / rate:g}: give another one, or drop it"
        )
    if left_out := len(split.train) - len(train):
        here, there = printable(source), printable(held_out_source)
        log.info("%s: %d recordings are in %s as well, and held out", here, left_out, there)
    return _Split(train, other.train, split.skipped + other.skipped, split.strange + other.strange)


def _split(
    source: str, rate: int, length: int, *, short_ones: bool = False, whole: bool = False
) -> _Split:
    """Both sides of a source.

    Files that neither are recordings nor are named like one (a README) are passed over in silence.

    Args:
        short_ones: also use recordings that are too short for a clip.
        whole: nothing of it is held out.
    """
    paths = _paths(source)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        headers = dict(zip(paths, threads.map(_keyed, paths), strict=True))
    readable = [one for one in headers.values() if one]
    strange = [one.path for one in readable if one.rate not in RATES]
    readable = [one for one in readable if one.rate in RATES]
    least = 1 if short_ones else length
    usable = [one for one in readable if one.places(rate, least) > 0]
    sides = _sides(source, usable, [one.places(rate, length) > 0 for one in usable])
    if whole:
        train, held_out = usable, []
    elif sides is not None:
        train, held_out = (
            [one for one, side in zip(usable, sides, strict=True) if side is late]
            for late in (False, True)
        )
    else:
        cut = [(one, _side(one, "early"), _side(one, "late")) for one in usable]
        cut = [sides for sides in cut if min(side.places(rate, least) for side in sides) > 0]
        usable, train, held_out = ([sides[i] for sides in cut] for i in range(3))
    used = {*(one.path for one in usable), *strange}
    skipped = [
        path
        for path, one in headers.items()
        if path not in used and (one or path.suffix.lower() in SUFFIXES)
    ]
    return _Split(train, held_out, skipped, strange)


def _sides(source: str, parts: list[Part], long_enough: list[bool]) -> list[bool] | None:
    """Which recordings are held out; None: they are few, or equal, and each is cut in time.

    Those that give a clip decide, so that the sides do not depend on who asks.
    """
    root, keys = _root(source), [part.key for part in parts]
    names = [_name(part.path, root) for part in parts]
    by_voice = None if source in EMBEDDED else voices(names, keys)
    labels = by_voice or keys
    chosen = [i for i, enough in enumerate(long_enough) if enough]
    if by_voice is None and len(chosen) < FEWEST:
        return None
    late = held_out_by_content(
        [labels[i] for i in chosen],
        SHARE,
        names=[names[i] for i in chosen] if source in EMBEDDED else None,
    )
    if not any(late):
        return None
    side_of = {labels[i]: side for i, side in zip(chosen, late, strict=True)}
    return [side_of.get(label, place_of(label) < SHARE) for label in labels]


def _side(whole: Part, side: Literal["early", "late"]) -> Part:
    """One side of a recording that is cut in time, before any filter mixes the two."""
    border = int(EARLY_SHARE * whole.end)
    return whole._replace(end=border) if side == "early" else whole._replace(first=border)


def _drawn(
    parts: list[Part],
    count: int,
    rate: int,
    length: int,
    rng: np.random.Generator,
    memory: int,
) -> LazyClips:
    """`count` clips at places drawn from all parts together."""
    if not parts:
        raise NothingReadableError("there is no recording")
    room = np.array([part.places(rate, length) for part in parts])
    quotas = rng.multinomial(count, room / room.sum())
    places = [
        rng.integers(n, size=int(quota)) for n, quota in zip(room, quotas, strict=True) if quota
    ]
    every = np.concatenate([np.empty(0, dtype=np.int64), *places])
    return LazyClips(parts, quotas, every, rate, length, memory)
