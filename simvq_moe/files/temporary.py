"""Temporary folders that go with their process, also where a signal tells it to end."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENDING = (signal.SIGTERM, signal.SIGHUP)
"""What `kill`, a cluster or a terminal that is closed ends a process by, at once and with whatever
it has made left behind."""


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder that is removed at the end of the block; for the main thread."""
    with interrupted_by(*ENDING), tempfile.TemporaryDirectory(prefix=prefix) as folder:
        yield Path(folder)


@contextmanager
def interrupted_by(*numbers: signal.Signals) -> Iterator[None]:
    """In this block these signals stop like Ctrl-C; one that is ignored, as nohup wants SIGHUP to
    be, stays ignored."""
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
