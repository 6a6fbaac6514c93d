"""Sets of clips of recordings: in memory, read batch by batch, and windows that cover everything.

All are read by `piece`, so that they are the same samples. A recording that ends before its header
says is cut there, and what can't be decoded is left out; either is named in the log.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from jaxtyping import Float32, Int16, Int64
from torch import Tensor

from simvq_moe.data.media.recordings import FULL_SCALE, Part, frames_there, piece
from simvq_moe.data.order import Indices
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import is_told, printable

NAMED = 5
"""Recordings that a warning names; the rest are counted."""
READ_AHEAD = 64
"""Windows that are read at once where one after another is asked for."""
PIECE = 2**20
"""Samples, at the higher of both rates, that are held of a recording at a time."""

log = logging.getLogger(__name__)


class NothingReadableError(ConfigError):
    """There is no recording left that a clip could be of."""


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


class Reader:
    """Parts of recordings, of which some turn out damaged or short when they are read.

    What is read depends on the files alone, not on what was read before.

    Args:
        parts: what is read.
        rate: Hz.
        least: samples without which a part is of no use.
        announce: name what turns out so in the log at once.
    """

    def __init__(
        self, parts: Sequence[Part], rate: int, least: int, *, announce: bool = True
    ) -> None:
        self.parts, self.rate, self.least, self.announce = parts, rate, least, announce
        self.broken: set[int] = set()
        """Numbers of parts of which something can't be decoded."""
        self.cut: dict[int, Part] = {}
        """Parts by number that end before their headers say."""
        self._lock = Lock()

    def part(self, number: int) -> Part:
        """The part as far as it is known to reach."""
        return self.cut.get(number, self.parts[number])

    def samples(self, number: int, first: int, end: int) -> Int16[np.ndarray, " time"] | None:
        """Samples from first to end of a part, fewer at its end; None: they can't be decoded."""
        part = self.part(number)
        end = max(first, min(end, part.samples(self.rate)))
        found = piece(part, first, end, self.rate)
        if found is not None and len(found) == end - first:
            return found
        if found is not None and self._shorten(number, part):
            return self.samples(number, first, end)
        self._break(number)
        return None

    def _shorten(self, number: int, thought: Part) -> bool:
        """Count what a part really has; False: as much as was thought."""
        if self.part(number) != thought:  # another thread did
            return True
        end = max(thought.first, min(thought.end, frames_there(thought.path)))
        shorter = thought._replace(end=end)
        if shorter == thought:
            return False
        with self._lock:
            known = number in self.cut
            self.cut.setdefault(number, shorter)
        if shorter.samples(self.rate) < self.least:
            self._break(number)
        elif not known:
            self._say("cut recording that is shorter than its header says", len(self.cut), number)
        return True

    def _break(self, number: int) -> None:
        with self._lock:
            known = number in self.broken
            self.broken.add(number)
        if not known:
            self._say("skipped damaged recording", len(self.broken), number)

    def _say(self, what: str, count: int, number: int) -> None:
        if self.announce and is_told(count):
            log.warning("%s %d: %s", what, count, printable(self.parts[number].path.name))


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
        parts: Sequence[Part],
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
        self.reader = Reader(parts, rate, length)
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
        """Differs when the recordings, the clips' places, their rate or their length differ."""
        return _digest(self.parts, self.places, self.part_of, self.rate, self.length)

    def in_memory(self) -> tuple[AudioClips, Reader]:
        """The same clips, read recording by recording, and what was found on the way.

        Of a recording that is damaged in one of the pieces, no clip is taken.

        Raises:
            NothingReadableError: every recording is damaged.
        """
        clips = np.empty((len(self), self.length), dtype=np.int16)
        reader = self.reader = Reader(self.parts, self.rate, self.length, announce=False)
        ends = np.searchsorted(self.part_of, np.arange(len(self.parts)), side="right")
        left: list[int] = []
        for number, (first, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
            mine = np.arange(first, end)
            if len(mine) and not self._fill(number, mine, clips):
                left += mine.tolist()
        damaged = set(reader.broken)
        for index in left:
            clips[index] = self._clip(index, damaged)
        return AudioClips(torch.from_numpy(clips)), reader

    def _fill(self, number: int, mine: np.ndarray, clips: Int16[np.ndarray, "clips time"]) -> bool:
        """Read clips of one part, a piece at a time; False: it is damaged."""
        part = self.parts[number]
        span = max(1, PIECE * self.rate // max(self.rate, part.rate))
        mine = mine[np.argsort(self.places[mine])]
        borders = np.flatnonzero(np.diff(self.places[mine] // span)) + 1
        for group in np.split(mine, borders):
            first, end = self.places[group[0]], self.places[group[-1]] + self.length
            samples = self.reader.samples(number, int(first), int(end))
            if samples is None:
                return False
            if len(samples) < end - first:  # the part is cut
                for index in group:
                    clip = self._of(number, int(self.places[index]))
                    if clip is None:
                        return False
                    clips[index] = clip
            else:
                at_every_place = np.lib.stride_tricks.sliding_window_view(samples, self.length)
                clips[group] = at_every_place[self.places[group] - first]
        return True

    def _clip(self, index: int, damaged: Collection[int] = ()) -> Int16[np.ndarray, " time"]:
        if index in self.kept:
            return self.kept[index]
        first = int(self.part_of[index])
        for step in range(len(self.parts)):
            number = (first + step) % len(self.parts)
            clip = None if number in damaged else self._of(number, int(self.places[index]))
            if clip is not None:
                if len(self.kept) < self.room:
                    self.kept[index] = clip.copy()
                return clip
        raise NothingReadableError("every recording of the data set is damaged")

    def _of(self, number: int, place: int) -> Int16[np.ndarray, " time"] | None:
        """The clip at a place, counted on from the start where the part is shorter."""
        room = self.reader.part(number).places(self.rate, self.length)
        if room < 1:
            return None
        clip = self.reader.samples(number, place % room, place % room + self.length)
        if clip is not None and len(clip) < self.length:
            return self._of(number, place)
        return clip


class RecordingWindows:
    """Whole recordings, in windows of equal length that cover every sample once, in order.

    The last window of a recording is filled up with silence; `lengths` has the samples before it.

    Args:
        parts: the recordings.
        names: of the parts.
        rate: Hz.
        length: samples of a window.
    """

    def __init__(self, parts: Sequence[Part], names: Sequence[str], rate: int, length: int) -> None:
        self.parts, self.names, self.rate, self.length = parts, names, rate, length
        totals = np.array([part.samples(rate) for part in parts], dtype=np.int64)
        windows = -(-totals // length)
        self.recording_of: Int64[np.ndarray, " windows"] = np.repeat(np.arange(len(parts)), windows)
        """Number of the recording of each window."""
        ends = np.cumsum(windows)
        within = np.arange(len(self.recording_of)) - np.repeat(ends - windows, windows)
        self.places: Int64[np.ndarray, " windows"] = within * length
        """First sample of each window within its recording."""
        self.lengths: Int64[np.ndarray, " windows"] = np.minimum(
            length, totals[self.recording_of] - self.places
        )
        """Samples of each window by the header of its recording; `read` has what is there."""
        self.reader = Reader(parts, rate, 1)
        self.threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1))

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, indices: Indices) -> Float32[Tensor, "batch time"]:
        """The windows named by indices, in [-1, 1)."""
        return self.read(indices)[0]

    def read(
        self, indices: Indices
    ) -> tuple[Float32[Tensor, "batch time"], Int64[np.ndarray, " batch"]]:
        """The windows named by indices, and the samples of each before silence fills it up: 0
        where they can't be decoded, fewer than `lengths` where the header promised too much."""
        wanted = np.asarray(indices, dtype=np.int64)
        windows = np.zeros((len(wanted), self.length), dtype=np.int16)
        lengths = np.zeros(len(wanted), dtype=np.int64)
        following = (np.diff(wanted) == 1) & (np.diff(self.recording_of[wanted]) == 0)
        runs = np.split(wanted, np.flatnonzero(~following) + 1) if len(wanted) else []
        found = (samples for run in self.threads.map(self._run, runs) for samples in run)
        for i, samples in enumerate(found):
            windows[i, : len(samples)], lengths[i] = samples, len(samples)
        return torch.from_numpy(windows).float() / FULL_SCALE, lengths

    def __iter__(self) -> Iterator[tuple[str, Float32[Tensor, " time"]]]:
        """Every window in order, as the name of its recording and the samples that it has."""
        for first in range(0, len(self), READ_AHEAD):
            indices = np.arange(first, min(first + READ_AHEAD, len(self)))
            for index, window, length in zip(indices, *self.read(indices), strict=True):
                yield self.names[int(self.recording_of[index])], window[: int(length)]

    def digest(self) -> str:
        """Differs when the recordings or the windows differ."""
        return _digest(self.parts, self.places, self.recording_of, self.rate, self.length)

    def _run(self, run: np.ndarray) -> list[Int16[np.ndarray, " time"]]:
        """Windows that follow one another, read at once, because some encodings can't be entered
        but from their start; where that fails, each for itself, so that the others are whole."""
        number, place = int(self.recording_of[run[0]]), int(self.places[run[0]])
        end = place + int(self.lengths[run].sum())
        if len(run) > 1 and end - place <= PIECE:
            found = piece(self.reader.part(number), place, end, self.rate)
            if found is not None and len(found) == end - place:
                return [found[i : i + self.length] for i in range(0, len(found), self.length)]
        alone = (
            self.reader.samples(number, int(self.places[i]), int(self.places[i]) + self.length)
            for i in run
        )
        return [np.empty(0, dtype=np.int16) if one is None else one for one in alone]


def _digest(
    parts: Sequence[Part], places: np.ndarray, part_of: np.ndarray, rate: int, length: int
) -> str:
    found = hashlib.blake2b(places.tobytes() + part_of.tobytes(), digest_size=16)
    # places say neither where every clip is a whole recording
    found.update(f"{length} samples at {rate} Hz\n".encode())
    for part in parts:
        # the content, because a name says nothing of it
        content = part.key or os.fsencode(part.path.name).hex()
        found.update(f"{content} {part.first} {part.end} {part.rate}\n".encode())
    return found.hexdigest()


def named(paths: Sequence[Path]) -> str:
    """The first names of files."""
    return ", ".join(printable(path.name) for path in paths[:NAMED]) + (
        ", ..." if paths[NAMED:] else ""
    )
