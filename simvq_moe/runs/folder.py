"""The folder of a run: one process at a time has it, and one that is refused leaves it as it was.

Who makes the folder is decided by `mkdir`, who has it by a lock, and what lies in it is looked at
with the lock in hand. The lock ends with its process, so that a killed run is in nobody's way.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from simvq_moe.config.checks_moe import with_gates
from simvq_moe.config.loading import first_difference, merge_files, to_yaml
from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError
from simvq_moe.files.locks import take
from simvq_moe.files.of_runs import CHECKPOINTS, CONFIG, LOGS, META, NOISE, SUMMARY
from simvq_moe.files.regular import BrokenFileError, read_bytes, read_json, read_text, sync_folder
from simvq_moe.runs import checkpoint

LOCK = ".lock"
"""Locked by the process that has the folder, whose mark it holds."""
ATTEMPTS = 100
"""To take a folder that others make and remove at the same moment."""
SECONDS_TO_APPEAR = 60.0
"""Seconds until others see what one machine wrote in a network's folder: NFS looks again after so
long at most (acdirmax)."""
FREE_TO_CHANGE = (
    *("zero_stage", "activation_checkpointing", "compile", "profile", "peak_flops"),
    *("log_every", "eval_every", "save_every", "keep_checkpoints", "keep_every", "async_save"),
    *("on_not_finite", "timeout_s", "trackers", "tracker_project"),
)
"""Keys of `train` that change, when a run goes on, where numbers lie, how they are computed and how
often they are looked at, but not what they are."""


@dataclass
class RunFolder:
    """A folder that this process has."""

    path: Path
    mark: str
    """What its lock holds, by which other ranks know that they look at the same folder."""
    made: list[Path]
    """The folders that this process made, the innermost last."""
    there: frozenset[str]
    """Names that lay in it before."""
    begun: bool = False
    """Whether a run has begun, of which nothing is removed."""

    def leave(self) -> None:
        """Remove what this process put there; all that is others' stays, and so do folders that
        hold it."""
        if self.begun:
            return
        for name in {LOCK, NOISE} - self.there:
            with suppress(OSError):
                (self.path / name).unlink()
        if LOGS not in self.there:
            shutil.rmtree(self.path / LOGS, ignore_errors=True)
        _remove_empty(self.made)


def log_file(run_dir: Path, rank: int) -> Path:
    """Where what the libraries of a rank say is written."""
    return run_dir / NOISE if rank == 0 else run_dir / LOGS / f"rank_{rank}.txt"


@contextmanager
def claimed(run_dir: Path) -> Iterator[RunFolder]:
    """The folder, made unless it is there, to the exclusion of other processes.

    A `ConfigError` inside, before the run has begun, leaves nothing behind.

    Raises:
        ConfigError: another process has it, or it can't be made or written.
    """
    made: list[Path] = []
    try:
        lock, had_lock = _take(run_dir, made)
    except OSError as error:
        _remove_empty(made)
        raise ConfigError(
            f"{run_dir} can't be made or written: {error.strerror}: give another --runs_dir or "
            "--name"
        ) from None
    with lock:
        there = set(os.listdir(run_dir)) - (set() if had_lock else {LOCK})
        lock.seek(0)
        folder = RunFolder(run_dir, lock.read().decode(), made, frozenset(there))
        try:
            yield folder
        except ConfigError:
            folder.leave()
            raise


def _take(run_dir: Path, made: list[Path]) -> tuple[IO[bytes], bool]:
    """The locked file with this process' mark, and whether there was such a file.

    Args:
        made: gets the folders that had to be made, the innermost last.
    """
    path = run_dir / LOCK
    for attempt in range(ATTEMPTS):
        try:
            _make(run_dir, made)
            had_lock, lock = path.exists(), _locked(path)
            if lock is not None:
                return lock, had_lock
        except FileNotFoundError:
            if attempt == ATTEMPTS - 1:
                raise
        # another process that was refused has just removed it
    raise OSError(errno.EAGAIN, "others make and remove it all the time")


def _locked(path: Path) -> IO[bytes] | None:
    """The file, locked until it is closed, with a mark; None: by now the path is of another."""
    lock = path.open("ab+", buffering=0)
    try:
        _lock(lock, path.parent)
        if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            lock.truncate(0)
            lock.write(uuid4().hex.encode())
            return lock
    except BaseException:
        lock.close()
        raise
    lock.close()
    return None


def _make(folder: Path, made: list[Path]) -> None:
    """Make a folder and those around it."""
    if not folder.parent.is_dir():
        _make(folder.parent, made)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise
        return
    made.append(folder)
    sync_folder(folder.parent)


def _remove_empty(made: Sequence[Path]) -> None:
    for folder in reversed(made):
        with suppress(OSError):  # somebody else's files lie in it
            folder.rmdir()


def _lock(file: IO[bytes], run_dir: Path) -> None:
    """Lock a file until it is closed.

    Raises:
        ConfigError: another process has done so.
    """
    refusal = f"another process is training in {run_dir}: wait for it, or give another --name"
    if reason := take(file, refusal):
        print(
            f"{run_dir}: its file system has no locks ({reason}): see to it that no other "
            "process trains there",
            file=sys.stderr,
        )


def is_trained(run_dir: Path) -> bool:
    """Whether a process trains in the folder, where locks can tell."""
    try:
        with (run_dir / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # nobody has, or the file system has no locks
        return False
    return False


def check_shared(run_dir: Path, mark: str) -> None:
    """Raise `ConfigError` unless this rank sees the folder in which rank 0 has left its mark."""
    until = time.monotonic() + SECONDS_TO_APPEAR
    while time.monotonic() < until:
        with suppress(BrokenFileError):
            if read_text(run_dir / LOCK) == mark:
                return
        time.sleep(0.1)
    raise ConfigError(
        f"runs_dir {run_dir.parent} is not the folder that rank 0 writes to: give one that all "
        "machines share"
    )


def has_summary(run_dir: Path) -> bool:
    """Whether the folder holds the final numbers of a run; a torn file holds none."""
    try:
        read_json(run_dir / SUMMARY, dict)
    except BrokenFileError:
        return False
    return True


def own_meta(run_dir: Path) -> dict[str, Any]:
    """What a run of ours has written of itself; {}: nothing that is whole."""
    try:
        return read_json(run_dir / META, dict)
    except BrokenFileError:
        return {}


def status_of(run_dir: Path) -> str:
    """finished, failed, interrupted, running or pending, from the run's own records."""
    # a summary torn by a power cut is not there
    return "finished" if has_summary(run_dir) else str(own_meta(run_dir).get("status", "pending"))


def check_same_run(config: Config) -> Config | None:
    """The config of the run that the folder holds; None: it holds none, or none that is known.

    Raises:
        ConfigError: it holds a run of another config, or of another form.
    """
    saved = _saved_config(config)
    config = with_gates(config)
    difference = saved and first_difference(_laid_out_as(config, with_gates(saved)), config)
    if difference:
        raise ConfigError(
            f"{config.run_dir} holds a run of another config ({difference}): "
            "give this run another --name, or remove that folder"
        )
    if not has_summary(config.run_dir):
        checkpoint.check_form(config.run_dir / CHECKPOINTS)
    return saved


def _saved_config(config: Config) -> Config | None:
    """The config in the run's folder; where a power cut has torn it, that of its newest
    checkpoint."""
    path = config.run_dir / CONFIG
    if not path.is_file():
        return None
    content = read_bytes(path)
    of_checkpoint = checkpoint.config_file(config.run_dir / CHECKPOINTS)
    if _is_whole(content) or (of_checkpoint is None and content.endswith(b"\n")):
        return merge_files(Config, [path])
    if of_checkpoint is None:
        return None
    saved = merge_files(Config, [of_checkpoint])
    return replace(saved, name=config.name, runs_dir=config.runs_dir)


def _is_whole(content: bytes) -> bool:
    """Whether the text of a config ends with the last key."""
    last_key = to_yaml(Config()).rstrip().rpartition("\n")[2].partition(":")[0].encode()
    last_line = content.rstrip(b"\n").rpartition(b"\n")[2]
    return content.endswith(b"\n") and last_line.startswith(last_key)


def _laid_out_as(new: Config, old: Config) -> Config:
    """old, with what a run may change when it goes on as in new, and more steps as well."""
    kept = {name: getattr(new.train, name) for name in FREE_TO_CHANGE}
    steps = max(old.train.steps, new.train.steps)
    # how data are read is free as well, so that a run may go on past broken ones
    data = replace(old.data, prefetch=new.data.prefetch, on_corrupt=new.data.on_corrupt)
    return replace(
        old,
        data=data,
        moe=replace(old.moe, expert_parallel=new.moe.expert_parallel),
        train=replace(old.train, steps=steps, **kept),
    )
