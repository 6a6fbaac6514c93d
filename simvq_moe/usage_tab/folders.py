"""The runs below a folder that have counted something, read when they are asked for and kept.

A folder may be anybody's: everything is read by the readers of `simvq_moe.runs`, and read again
only when its file has changed.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from simvq_moe.files.of_runs import FOLDERS, META, PROBE, USAGE
from simvq_moe.files.regular import BrokenFileError
from simvq_moe.records.usage_metrics import Layer, layer_names
from simvq_moe.runs.counts import Windows, read_probe, read_windows
from simvq_moe.runs.files import read_meta, shown

T = TypeVar("T")

MOST_RUNS = 2_000
"""Runs that are listed."""
KEPT_BYTES = 2**29
"""Bytes of arrays that are kept in memory: 512 MiB."""
LARGEST_COUNTS = 2**30
"""Bytes of the counts of a run, unpacked."""
SEED_FOLDER = re.compile(r"seed[-_]?\d{1,9}")
"""The folder of a run of a sweep, which lies in that of its arm."""
Stamp = tuple[int, int, int]
"""Inode, time of change and size of a file."""


@dataclass(frozen=True)
class Run:
    """A run folder with counts."""

    name: str
    """Its path from the folder of runs on, safe to show, of which there is only one."""
    path: Path
    group: str
    """The folder that holds its arm, and with it the arms that it is compared with."""
    version: str
    """Another one whenever its files have changed."""
    arm: str
    seed: int | None
    task: str
    status: str
    layers: tuple[Layer, ...]
    """Empty: meta.json does not say."""
    error: str | None
    """What can't be read of it."""

    @property
    def layer_names(self) -> list[str]:
        return layer_names(self.layers)


class Folder:
    """The folder of runs, and what is kept of them.

    Args:
        path: the folder; a relative one is meant from the working directory on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: OrderedDict[tuple[Any, ...], tuple[Any, int]] = OrderedDict()
        self._lock = Lock()

    def runs(self) -> tuple[list[Run], int]:
        """The first runs in the order of their names, and the number of those left out."""
        found = []
        for name, folders, files in os.walk(self.path):
            is_run = USAGE in files
            folders[:] = sorted(f for f in folders if not (is_run and f in FOLDERS))
            if is_run:
                found.append(Path(name))
        names: dict[str, Path] = {}
        for path in found[:MOST_RUNS]:
            own = shown(os.path.relpath(path, self.path))
            own = self.path.resolve().name if own == "." else own
            while own in names:
                own += "'"
            names[own] = path
        return [self._run(name, path) for name, path in names.items()], len(found) - len(names)

    def windows(self, run: Run, *, held_out: bool) -> Windows | None:
        """Counts of all its windows, or of all its evaluations."""
        layers = [{"slots": layer.slots} for layer in run.layers]

        def read() -> Windows | None:
            return read_windows(run.path, layers, held_out=held_out, limit=LARGEST_COUNTS)

        return self.kept(run.path / USAGE, ("windows", held_out), read)

    def probe(self, run: Run) -> dict[str, Any] | None:
        """How the run routed its probe, if it has one."""
        return self.kept(run.path / PROBE, ("probe",), lambda: read_probe(run.path))

    def kept(self, file: Path, what: tuple[Any, ...], read: Callable[[], T]) -> T:
        """What a reader makes of a file, or what it made of it while that has not changed."""
        key = (os.fspath(file), *what, stamp(file))
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        value = read()
        with self._lock:
            for old in [one for one in self._kept if one[:-1] == key[:-1]]:
                del self._kept[old]
            self._kept[key] = value, size_of(value)
            while sum(size for _, size in self._kept.values()) > KEPT_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return value

    def _run(self, name: str, path: Path) -> Run:
        def read() -> tuple[dict[str, Any], str | None]:
            try:
                return read_meta(path), None
            except BrokenFileError as error:
                return {}, shown(str(error))

        meta, error = self.kept(path / META, ("meta",), read)
        in_arm = SEED_FOLDER.fullmatch(path.name) and path != self.path
        arm = path.parent if in_arm else path
        stamps = [stamp(path / file) for file in (USAGE, META, PROBE)]
        return Run(
            name=name,
            path=path,
            group=shown(os.path.relpath(arm.parent, self.path)),
            version="-".join(str(number) for one in stamps for number in one),
            arm=meta.get("arm") or shown(arm.name),
            seed=meta.get("seed"),
            task=meta.get("task", ""),
            status=meta.get("status", ""),
            layers=tuple(Layer(**layer) for layer in meta.get("layers", ())),
            error=error,
        )


def stamp(file: Path) -> Stamp:
    """What changes with a file; zeros: there is none."""
    try:
        found = file.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def size_of(value: Any) -> int:
    """About the bytes of what is kept."""
    if isinstance(value, Windows):
        return value.steps.nbytes + value.counts.nbytes
    if isinstance(value, dict):
        return 1_000 + sum(getattr(part, "nbytes", 0) for part in value.values())
    return 1_000
