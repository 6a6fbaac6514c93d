"""Locks: one process at a time has a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from simvq_moe.errors import ConfigError


def take(lock: IO[bytes] | int, refusal: str) -> str | None:
    """Lock an open file or folder until it is closed.

    Returns:
        Why it is not locked, where the file system has no locks (Lustre without -o flock, many
        network and FUSE mounts): a lock is a help and no need. None: it is locked.

    Raises:
        ConfigError: another process has locked it; its text is `refusal`.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(refusal) from None
    except OSError as error:
        return error.strerror
    return None


@contextmanager
def alone(folder: Path, refusal: str) -> Iterator[bool]:
    """Hold a folder, which is locked itself: nothing is left in it, however this process ends.

    Yields:
        Whether it is held: not so on a file system without locks.

    Raises:
        ConfigError: another process holds it; its text is `refusal`.
    """
    with _opened(folder) as descriptor:
        yield take(descriptor, refusal) is None


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Hold a folder, which is locked itself, as soon as no other process does."""
    with _opened(folder) as descriptor:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
