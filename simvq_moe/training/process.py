"""This process while it trains: signals that it remembers, and where its libraries' noise goes."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from simvq_moe.engine.settings import import_deepspeed


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGINT, SIGTERM and the SIGHUP of a terminal that is closed are remembered, so that the loop
    stops after a whole step; nohup, which wants SIGHUP to be ignored, has its way."""
    received: list[int] = []
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    handled = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hangs_up else ()))
    before = {s: signal.signal(s, lambda number, _: received.append(number)) for s in handled}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Noise(io.TextIOBase):
    """A file that may be written to before it is known where it lies."""

    def __init__(self) -> None:
        self.file: TextIO = io.StringIO()

    def begin(self, path: Path) -> None:
        """Write to the end of this file from now on, first what was written before."""
        before, self.file = self.file, path.open("a", buffering=1)
        assert isinstance(before, io.StringIO)
        self.file.write(before.getvalue())

    def write(self, text: str, /) -> int:
        return self.file.write(text)

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def noise_to_file(*, visible: bool) -> Iterator[Noise]:
    """What libraries print, log and warn of goes to a file; our own warnings also to the user."""
    log = Noise()
    with contextlib.redirect_stdout(log):
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        root, ours = logging.getLogger(), logging.getLogger("simvq_moe")
        console = logging.StreamHandler(sys.stderr)
        console.setLevel(logging.WARNING)
        ours.setLevel(logging.INFO)
        root.addHandler(handler)
        if visible:
            ours.addHandler(console)
        logging.captureWarnings(True)
        # deepspeed's logger has its own handler on standard output
        deepspeed_logger = import_deepspeed().utils.logger
        before = deepspeed_logger.handlers[:]
        deepspeed_logger.handlers[:] = [handler]
        try:
            yield log
        finally:
            deepspeed_logger.handlers[:] = before
            logging.captureWarnings(False)
            root.removeHandler(handler)
            ours.removeHandler(console)
            log.file.close()
