"""A run under way, started here or by another process, and the time that runs still take.

A run is followed by what it writes to launcher.log in its folder.
"""

from __future__ import annotations

import heapq
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from simvq_moe.errors import USAGE_ERROR
from simvq_moe.files.of_runs import META
from simvq_moe.files.regular import write_json
from simvq_moe.runs.folder import is_trained, own_meta
from simvq_moe.sweeps.machine import Machine, Starter
from simvq_moe.sweeps.plan import PROCESS, PlannedRun

SECONDS_BETWEEN_LINES = 5.0
STEP = re.compile("step ([0-9]{1,15})/([1-9][0-9]{0,14})(?![0-9])")
"""How a line of progress begins; libraries and plug-ins write to the same log."""


class Followed:
    """A run under way, followed in its launcher.log; another process has started it."""

    def __init__(self, run: PlannedRun, label: str) -> None:
        self.run, self.label = run, label
        self.log = run.folder / "launcher.log"
        self.began = self.printed = time.monotonic()
        self.line, self.share = "", 0.0
        self.first: tuple[float, float] | None = None
        """Seconds and share at its first line, before which it was starting."""
        self.read_to = 0

    def poll(self) -> int | None:
        """0 once it has ended, however."""
        return None if is_trained(self.run.folder) else 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def seconds_left(self) -> float | None:
        """Seconds left at its own speed since its first line; None: it has told only one."""
        if self.first is None or self.share <= self.first[1]:
            return None
        began, share = self.first
        return (1 - self.share) * (self.seconds - began) / (self.share - share)

    def is_due(self) -> bool:
        """Whether it has something to tell that is not told yet."""
        return 0 < self.share < 1 and time.monotonic() - self.printed > SECONDS_BETWEEN_LINES

    def read(self) -> bool:
        """Take up what it has written since; whether it has just told its last step."""
        if not self.log.is_file():  # of one that was started by hand
            return False
        with self.log.open("rb") as log:
            log.seek(self.read_to)
            new = log.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.read_to += len(whole)
        text = whole.decode(errors="replace")
        told = [found for found in map(STEP.match, text.splitlines()) if found]
        if not told:
            return False
        self.line = told[-1].string.rstrip()
        done, steps = map(int, told[-1].groups())
        self.share = done / steps
        self.first = self.first or (self.seconds, self.share)
        return done == steps

    def last_words(self) -> str:
        """The last line of the log."""
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no word")


class Process(Followed):
    """A run that is started here."""

    def __init__(
        self,
        run: PlannedRun,
        label: str,
        config: Path,
        machine: Machine,
        slot: int,
        starter: Starter,
    ) -> None:
        super().__init__(run, label)
        run.folder.mkdir(parents=True, exist_ok=True)
        self.read_to = self.log.stat().st_size if self.log.is_file() else 0
        self.started = starter(config, self.log, machine, machine.gpus_of(slot))

    def poll(self) -> int | None:
        return self.started.poll()

    def record_end(self, became: str) -> None:
        """Write down the end of a run that could not do so itself, being killed or refused."""
        meta = own_meta(self.run.folder)
        code = self.started.wait()
        # a run that was refused is another process'
        if meta and (meta.get("status") != "running" or code == USAGE_ERROR):
            return
        if not meta and became == "interrupted":
            return  # it had not begun
        why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        error = f"{why}; its last words: {self.last_words()}"
        write_json(self.run.folder / META, meta | {"status": became, "error": error}, apart=PROCESS)


class Clock:
    """Time left of a sweep, from the runs that it has seen to the end and those under way."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = defaultdict(list)
        """Seconds of each finished run, by group."""

    def left(self, going: Sequence[Followed], waiting: Sequence[str], slots: int) -> float | None:
        """Seconds until the last run ends, each started where one ends; None: unknown.

        Args:
            going: the runs under way.
            waiting: the groups of the others, in their order.
            slots: runs at a time.
        """
        guesses: dict[str, list[float]] = defaultdict(list)
        for one in going:
            if (more := one.seconds_left()) is not None:
                guesses[one.run.group].append(one.seconds + more)

        def expected(group: str) -> float | None:
            every = ([s for seconds in by.values() for s in seconds] for by in (self.seen, guesses))
            for found in (self.seen[group], guesses[group], *every):
                if found:
                    return sum(found) / len(found)
            return None

        ends = [0.0] * (slots - len(going))
        for one in going:
            more, whole = one.seconds_left(), expected(one.run.group)
            if more is None and whole is None:
                return None
            ends.append(max(0.0, (whole or 0.0) - one.seconds) if more is None else more)
        heapq.heapify(ends)
        for group in waiting:
            seconds = expected(group)
            if seconds is None:
                return None
            heapq.heapreplace(ends, ends[0] + seconds)
        return max(ends)
