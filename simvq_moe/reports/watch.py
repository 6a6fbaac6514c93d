"""Runs in the terminal while they train: how far, what loss, how many slots in use.

Of each metrics.jsonl only what is new is read, so that hundreds of runs can be watched.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from simvq_moe.analysis.run_folders import BROKEN
from simvq_moe.errors import ConfigError
from simvq_moe.files.of_runs import CONFIG, FOLDERS, META, METRICS, SWEEP
from simvq_moe.files.regular import BrokenFileError, MissingFileError, open_regular, printable
from simvq_moe.records.catalogue import briefly
from simvq_moe.records.progress import duration
from simvq_moe.runs.files import SMALL, metrics_of, read_config, read_meta
from simvq_moe.runs.sweep_file import read_plan

SECONDS_BETWEEN_LOOKS = 2.0
BARS = "▁▂▃▄▅▆▇█"
BARS_SHOWN = 12
TOLD = (BROKEN, "failed")
"""The statuses whose reason is printed."""
SILENT_AFTER = 60.0
"""Seconds without a line, and ten times the usual gap, after which a run may be dead."""
ORDER = ("running", BROKEN, "failed", "interrupted", "finished", "pending")
COLOURS = {
    "running": "green",
    BROKEN: "bold red",
    "failed": "bold red",
    "interrupted": "yellow",
    "finished": "cyan",
    "pending": "dim",
}
ROWS_BESIDE_RUNS = 7
"""Lines of a screen that are not rows of runs."""
SHOWN = tuple(dict.fromkeys(one for one, _ in briefly()))
"""The metrics that have a column."""
USED = [name for one, name in briefly() if one.leaf == "used"]
"""Under which the used share of a whole model may be logged."""
TEXTS = ("run", "status", "used over time")
COLUMNS = (
    *("run", "status", "step", *(one.column for one in SHOWN)),
    *("used over time", "dead slots", "ETA"),
)
LAYER = re.compile(r"(codes|moe)(/\d+)?/dead")


def watch(runs_dir: Path, *, once: bool, console: Console | None = None) -> int:
    """Show every run at or below the folder, until Ctrl-C; the exit code.

    Args:
        runs_dir: the folder.
        once: print the whole table and stop, as where there is no terminal.
        console: where; None: standard output.

    Raises:
        ConfigError: the folder does not exist.
    """
    if not runs_dir.is_dir():
        raise ConfigError(f"{runs_dir} does not exist: give the folder that holds the runs")
    console = console or Console()
    runs = Watched(runs_dir)
    if once or not console.is_terminal:
        runs.look()
        # a pipe has no width: as wide as the table needs, rather than 80 columns
        console.width = console.width if console.is_terminal else 240
        console.print(runs.show(rows=None))
        return 0
    try:
        with Live(console=console, auto_refresh=False, screen=True) as live:
            while True:
                runs.look()
                live.update(runs.show(console.height - ROWS_BESIDE_RUNS), refresh=True)
                time.sleep(SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        return 0


class Watched:
    """Every run below a folder, as far as it has been read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[Path, WatchedRun] = {}
        self.pending: list[str] = []
        self.broken: list[str] = []
        """A line for each plan that can't be read."""

    def look(self) -> None:
        """Find new runs and read what is new of all."""
        found, planned = set(), []
        self.broken = []
        for name, folders, files in os.walk(self.folder):
            folders.sort()
            entries = {*folders, *files}
            if SWEEP in entries:
                planned += self._planned(Path(name))
            if META in entries:
                found.add(path := Path(name))
                folders[:] = [folder for folder in folders if folder not in FOLDERS]
                if path not in self.runs:
                    self.runs[path] = WatchedRun(path, self._name(path))
                self.runs[path].read()
        for gone in self.runs.keys() - found:
            del self.runs[gone]
        self.pending = [self._name(path) for path in planned if path not in found]

    def show(self, rows: int | None) -> RenderableType:
        """The table and a line that counts the runs.

        Args:
            rows: at most so many runs, those under way first; None: all.
        """
        runs = sorted(self.runs.values(), key=lambda run: (ORDER.index(run.status), -run.changed))
        cells = [run.cells() for run in runs]
        cells += [
            [Text(name), _status("pending"), *[""] * (len(COLUMNS) - 2)] for name in self.pending
        ]
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in COLUMNS:
            left = column in TEXTS
            table.add_column(
                column,
                justify="left" if left else "right",
                no_wrap=True,
                overflow="ellipsis",
                min_width=16 if column == "run" else None,
            )
        shown = cells if rows is None else cells[: max(1, rows)]
        for row in shown:
            table.add_row(*row)
        hidden = len(cells) - len(shown)
        more = (
            [Text(f"and {hidden} more: a taller window, or --once", style="dim")] if hidden else []
        )
        told = [f"{run.name}: {run.error}" for run in runs if run.status in TOLD and run.error]
        cut = rows is not None
        errors = [
            Text(line, style="red", overflow="ellipsis", no_wrap=cut)
            for line in [*self.broken, *told]
        ]
        return Group(table, *more, Text(self._counted()), *(errors if rows is None else errors[:3]))

    def _counted(self) -> str:
        counted = Counter(run.status for run in self.runs.values())
        counted["pending"] += len(self.pending)
        parts = [f"{counted[status]} {status}" for status in ORDER if counted[status]]
        return printable(f"{self.folder}: {', '.join(parts) or 'no runs yet'}")

    def _planned(self, sweep: Path) -> list[Path]:
        try:
            return read_plan(sweep)
        except BrokenFileError as error:
            self.broken.append(str(error))
            return []

    def _name(self, path: Path) -> str:
        name = os.path.relpath(path, self.folder)
        return printable(path.resolve().name if name == "." else name)


class WatchedRun:
    """One run, as far as its records have been read."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.meta: dict[str, Any] = {}
        self.meta_at = 0.0
        self.steps = 0
        self.faults: dict[str, str] = {}
        """What can't be read, by file."""
        self.forget()

    def forget(self) -> None:
        """Read metrics.jsonl from its beginning."""
        self.file: tuple[int, int] = (0, 0)
        self.lines = 0
        self.last: dict[str, float] = {}
        self.used: list[float] = []
        self.times: list[tuple[float, float]] = []

    @property
    def status(self) -> str:
        return BROKEN if self.faults else self.meta.get("status", "running")

    @property
    def error(self) -> str | None:
        return next(iter(self.faults.values()), self.meta.get("error"))

    @property
    def changed(self) -> float:
        """When it last wrote a line, or its status."""
        return max(self.meta_at, _written(self.path / METRICS))

    def read(self) -> None:
        """Take up what is new; what can't be read makes the run a broken one."""
        at = _written(self.path / META)
        if at != self.meta_at:
            self._try(META, self._read_meta)
            self.meta_at = at
        if not self.steps:
            self._try(CONFIG, self._read_steps)
        self._try(METRICS, self._read_metrics)

    def _try(self, file: str, read: Callable[[], None]) -> None:
        try:
            read()
            self.faults.pop(file, None)
        except BrokenFileError as error:
            self.faults[file] = str(error)

    def _read_meta(self) -> None:
        self.meta = read_meta(self.path)

    def _read_steps(self) -> None:
        self.steps = read_config(self.path)[1].steps or 0

    def _read_metrics(self) -> None:
        """Whole lines that were added since; all of them where a resumed run replaced the file.

        Nothing is read past a broken line, so that it stays what is wrong with the run.
        """
        path = self.path / METRICS
        try:
            file = open_regular(path, inside=self.path)
        except MissingFileError:
            return
        with file:
            found = os.fstat(file.fileno())
            if found.st_ino != self.file[0] or found.st_size < self.file[1]:
                self.forget()
            file.seek(self.file[1])
            while (line := file.readline(SMALL)).endswith(b"\n"):
                content = metrics_of(line, f"{path}, line {self.lines + 1},")
                self.file, self.lines = (found.st_ino, file.tell()), self.lines + 1
                self._take_up(content)
        if len(line) == SMALL:
            raise BrokenFileError(path, f"has a line of more than {SMALL:,} bytes")

    def _take_up(self, line: dict[str, float]) -> None:
        # what is only measured at evaluations stays
        self.last |= line
        self.used += [line[name] for name in USED if name in line][:1]
        self.times = [*self.times[-9:], (line["step"], line.get("time", math.nan))]

    def cells(self) -> list[RenderableType]:
        """The run's row, in the order of `COLUMNS`."""
        step = int(self.last.get("step", 0))
        last = {one: self.last[name] for one, name in briefly() if name in self.last}
        silent = self._silent()
        status = _status(self.status)
        if silent:
            status = Text(f"silent {duration(silent)}", style="yellow")
        left = self._seconds_a_step() * (self.steps - step)
        going = self.status == "running" and not silent and math.isfinite(left)
        return [
            Text(self.name),
            status,
            f"{step}/{self.steps}" if self.steps else str(step),
            *(one.cell(last[one]) if one in last else "" for one in SHOWN),
            sparkline(self.used),
            self._dead(),
            duration(left) if going else "",
        ]

    def _dead(self) -> str:
        """Slots without a draw in the last window, of all layers."""
        shares = sorted((n, self.last[n]) for n in self.last if LAYER.fullmatch(n))
        slots = [x["slots"] for x in self.meta.get("layers") or [] if x["kind"] != "kept"]
        if not shares or len(shares) != len(slots) or not all(0 <= s <= 1 for _, s in shares):
            return ""
        dead = sum(round(share * n) for (_, share), n in zip(shares, slots, strict=True))
        return f"{dead}/{sum(slots)}"

    def _seconds_a_step(self) -> float:
        (first, began), (last, ended) = (
            (self.times or [(0.0, 0.0)])[0],
            (self.times or [(0.0, 0.0)])[-1],
        )
        return (ended - began) / (last - first) if last > first else math.nan

    def _silent(self) -> float:
        """Seconds without a sign of life from a run that says it is running; 0: it is well."""
        if self.status != "running":
            return 0.0
        steps = self.times[-1][0] - self.times[-2][0] if len(self.times) > 1 else 0.0
        usual = self._seconds_a_step() * steps
        silent = time.time() - self.changed
        return silent if silent > max(SILENT_AFTER, 10 * usual if usual > 0 else 600.0) else 0.0


def sparkline(shares: Sequence[float], width: int = BARS_SHOWN) -> str:
    """Shares from 0 to 1 as bars on that scale, the last one to the right; means where they are
    more than fit."""
    shares = [min(1.0, max(0.0, share)) for share in shares if math.isfinite(share)]
    if not shares:
        return ""
    n = min(width, len(shares))
    edges = [round(i * len(shares) / n) for i in range(n + 1)]
    parts = [shares[a:b] for a, b in itertools.pairwise(edges)]
    means = [sum(part) / len(part) for part in parts]
    return "".join(BARS[min(int(m * len(BARS)), len(BARS) - 1)] for m in means)


def _status(status: str) -> Text:
    return Text(status, style=COLOURS[status])


def _written(file: Path) -> float:
    """When it was written last; 0: it is not there."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
