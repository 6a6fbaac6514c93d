"""A rank that stops moving ends the run, with one line that says which rank and where it is.

Every rank writes its place into a file of the run's folder, and a thread beside it a beat. A rank
that has stayed in one place for too long reads the files of all: a rank without a beat has stopped,
and otherwise the one that has come least far keeps the others waiting. Files also tell of the rank
that serves torch's own store, and do for gloo and NCCL alike, whose calls can't be interrupted.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from simvq_moe.engine.agreement import writing
from simvq_moe.engine.step_phases import Phase
from simvq_moe.engine.world import World
from simvq_moe.files.of_runs import META
from simvq_moe.files.regular import BrokenFileError, read_json, write_json

Patient = Literal["evaluation", "records", "checkpoint"]
"""Phases between steps, that may take as long as they do, on one rank or all."""
PLACE, BEAT = "{:<12}{:<12}{:<15}", "{:<12}"
"""What the training thread writes of itself, and behind it what the thread beside it adds."""
BEHIND = len(PLACE.format(0, 0, ""))
LONGEST_BEAT = 10.0
"""Seconds between beats, unless a tenth of the time-out is less."""
NAMED = 8
"""Ranks that a message names."""


class Place(NamedTuple):
    """Where a rank is."""

    moves: int
    """Phases that it began so far: all ranks go through the same ones."""
    step: int
    phase: str
    beats: int


class Hang(NamedTuple):
    """Who keeps the others waiting."""

    message: str
    ranks: list[int]


class Watchdog:
    """Watches all ranks of a run from each of them; a single rank has nobody who waits for it.

    Args:
        run_dir: the run's folder, which all ranks share.
        world: this rank among all.
        timeout: seconds without a move after which the run ends; 0: never.
    """

    def __init__(self, run_dir: Path, world: World, timeout: float) -> None:
        self.run_dir, self.world, self.timeout = run_dir, world, timeout
        self.beat = min(LONGEST_BEAT, timeout / 10)
        self.file: int | None = None
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.stopped = threading.Event()
        self.moves, self.step, self.first = 0, 0, 0
        self.moved_at = time.monotonic()

    def start(self, step: int) -> None:
        """Begin with this step, the first of the process, which may take longer: it compiles."""
        if self.world.size == 1 or not self.timeout:
            return
        path = _file(self.run_dir, self.world.rank)
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self.first = step
        self.move(step, "data")
        self._write(BEAT.format(0), BEHIND)
        self.thread.start()

    def move(self, step: int, phase: Phase | Patient) -> None:
        """This rank begins a phase of a step."""
        if self.file is None:
            return
        self.moves += 1
        self.step, self.moved_at = step, time.monotonic()
        self._write(PLACE.format(self.moves, step, phase), 0)

    def stop(self) -> None:
        """The run is over."""
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join()
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def _watch(self) -> None:
        beats = 0
        half: tuple[int, dict[int, Place]] | None = None
        while not self.stopped.wait(self.beat):
            beats += 1
            self._write(BEAT.format(beats), BEHIND)
            moves, waited = self.moves, time.monotonic() - self.moved_at
            if self.step == self.first or waited < self.timeout / 2:
                continue
            if half is None or half[0] != moves:
                half = moves, read_places(self.run_dir, self.world.size)
            elif waited > self.timeout:
                places = read_places(self.run_dir, self.world.size)
                found = find_hang(half[1], places, self.first)
                if found and self.moves == moves:
                    self._end(found, waited)
                half, self.moved_at = None, time.monotonic()

    def _write(self, text: str, offset: int) -> None:
        # of a full disk others will hear: what is there already takes no more room
        with suppress(OSError):
            if self.file is not None:
                os.pwrite(self.file, text.encode(), offset)

    def _end(self, hang: Hang, waited: float) -> None:
        others = [rank for rank in range(self.world.size) if rank not in hang.ranks]
        if self.world.rank == min(others, default=0):
            error = f"{hang.message}: others wait for {waited:.0f} s (train.timeout_s)"
            print(f"{self.run_dir}: {error}", file=sys.stderr, flush=True)
            with suppress(OSError, BrokenFileError):
                meta = read_json(self.run_dir / META, dict)
                failed = {"status": "failed", "error": error}
                write_json(self.run_dir / META, meta | failed)
        else:
            # a launcher ends all with the first that ends, which is to be the one that speaks
            time.sleep(3 * self.beat)
        # the training thread can't be reached where it is
        os._exit(1)


def read_places(run_dir: Path, ranks: int) -> dict[int, Place]:
    """Where each rank is; without those that have not begun."""
    places: dict[int, Place] = {}
    for rank in range(ranks):
        with suppress(OSError, ValueError):
            moves, step, phase, beats = _file(run_dir, rank).read_text().split()
            places[rank] = Place(int(moves), int(step), phase, int(beats))
    return places


def find_hang(before: Mapping[int, Place], now: Mapping[int, Place], first: int) -> Hang | None:
    """Who keeps the others waiting for longer than it may.

    Args:
        before: places half a time-out ago.
        now: places of the same ranks.
        first: the first step of the process.
    """
    ranks = [rank for rank in now if rank in before and now[rank].beats == before[rank].beats]
    silent = bool(ranks)
    least = min((now[rank] for rank in ranks or now), default=None)
    if least is None or (not silent and (least.phase in get_args(Patient) or least.step == first)):
        return None
    ranks = ranks or [rank for rank, place in now.items() if place.moves == least.moves]
    names = ", ".join(map(str, ranks[:NAMED])) + (", ..." if len(ranks) > NAMED else "")
    one = len(ranks) == 1
    return Hang(
        f"rank{'' if one else 's'} {names} {'has' if one else 'have'} not finished step "
        f"{least.step} ({least.phase}){' and no longer answer' if silent else ''}"
        f"{'s' if silent and one else ''}",
        ranks,
    )


def _file(run_dir: Path, rank: int) -> Path:
    return run_dir / ".ranks" / str(rank)
