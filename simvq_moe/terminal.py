"""How a command ends: what the machine or its terminal does to it is one line, and no traceback.

A reader may close standard output early, a disk may not take it, its encoding may lack a character,
and a shell may start a command without any of the three standard streams.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from typing import Any

from simvq_moe.engine.launched import launched_rank
from simvq_moe.errors import FAILED, INTERRUPTED, USAGE_ERROR, ConfigError
from simvq_moe.files.regular import printable

PLACES = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.ENOTDIR),
    *(errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP),
}
"""What a path can't be used for: another one, or a permission, is the way out."""
DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}
"""Failures to write that may name no file."""


def is_first_rank() -> bool:
    """Whether this process speaks for a launch, as its launcher says."""
    try:
        return launched_rank() == 0
    except ConfigError:  # which every process may tell
        return True


def open_streams() -> None:
    """Open standard streams that the shell has closed on the null device, so that no file of ours
    gets their number, and with it what others print."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False))


class _Unheard(io.TextIOBase):
    """A stream whose reader may go."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.stream.encoding

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


def unheard() -> redirect_stderr[Any]:
    """A block whose work goes on where what it tells on standard error is not heard any more: a
    terminal is closed, a `tee` ends. Records of it are in files."""
    return redirect_stderr(_Unheard(sys.stderr))


def ending(work: Callable[[], int], *, told: Callable[[], bool] = lambda: True) -> int:
    """Do the work and flush what it has printed; the exit code.

    Args:
        told: whether this process tells of errors, as one of several ranks does; asked when there
            is one, because work learns its rank.
    """
    for stream in _streams():
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = work()
    except SystemExit:  # --help
        if _has_all():
            raise
        return FAILED
    except ConfigError as error:
        code = USAGE_ERROR
        _tell(str(error), told())
    except KeyboardInterrupt:
        code = INTERRUPTED
    except OSError as error:
        if isinstance(error, BrokenPipeError) and any(map(_is_deserted, _streams())):
            _has_all()
            return FAILED
        if error.filename is None and error.errno not in DISKS:
            raise
        code = USAGE_ERROR if error.errno in PLACES else FAILED
        _tell(_reason(error), told())
    return code if _has_all() else (code or FAILED)


def _reason(error: OSError) -> str:
    name, reason = error.filename2 or error.filename, error.strerror or str(error)
    return reason if name is None else f"{os.fsdecode(name)}: {reason}"


def _tell(message: str, told: bool) -> None:
    if told:
        with suppress(OSError):  # `_has_all` finds out
            print(f"simvq-moe: {printable(message)}", file=sys.stderr)


def _streams() -> list[Any]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]


def _is_deserted(stream: Any) -> bool:
    """Whether the reader of a pipe has gone."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # no poll on this system, or no pipe
        return True
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _has_all() -> bool:
    """Whether what was printed has reached its readers; lets go of a stream that has none, so that
    nothing is left to be written, and to fail, when the interpreter ends."""
    reached = [_has(stream) for stream in _streams()]  # of every one, also after a lost one
    return all(reached)


def _has(stream: Any) -> bool:
    try:
        stream.flush()
    except OSError as error:
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            stream.flush()
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            _tell(f"standard output can't be written: {error.strerror}", told=True)
        return False
    except ValueError:  # closed by whoever called
        return True
    return True
