"""Temporary folders go with their process, however it is told to end."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

from simvq_moe.files.temporary import temporary_folder


def ended_by(number: signal.Signals, before: signal.Handlers) -> str:
    """How a process ends that gets a signal while it has a temporary folder."""
    pid = os.fork()
    if pid == 0:
        signal.signal(number, before)
        code = 1
        try:
            with temporary_folder("one_"):
                signal.raise_signal(number)
                code = 2
        except KeyboardInterrupt:
            code = 3
        finally:
            os._exit(code)
    return {2: "went on", 3: "interrupted"}.get(
        os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), ""
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_process_leaves_no_folder(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert ended_by(number, signal.SIG_DFL) == "interrupted"
    assert ended_by(number, signal.SIG_IGN) == "went on"  # as nohup starts it
    assert list(tmp_path.iterdir()) == []
