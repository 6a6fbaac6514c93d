"""One process at a time has a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest

from simvq_moe.errors import ConfigError
from simvq_moe.files.locks import alone
from simvq_moe.files.regular import is_told
from simvq_moe.files.unfinished import MARK, filling


def test_a_folder_that_is_held_is_refused_and_nothing_is_left_in_it(tmp_path: Path):
    with alone(tmp_path, "taken"):
        with pytest.raises(ConfigError, match="taken"), alone(tmp_path, "taken"):
            pass
        assert list(tmp_path.iterdir()) == []
    with alone(tmp_path, "taken"):
        pass


def test_a_process_that_is_killed_holds_nothing_any_more(tmp_path: Path):
    process = os.fork()
    if process == 0:
        with alone(tmp_path, "taken"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    with alone(tmp_path, "taken"):
        assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with alone(tmp_path, "taken"):
        pass


def test_a_folder_that_is_being_filled_is_refused_and_stays_as_it_is(tmp_path: Path):
    out = tmp_path / "out"
    with filling(out, "decode", {"weights": "a"}):
        (out / "file").write_text("half")
        with (
            pytest.raises(ConfigError, match="another process"),
            filling(out, "decode", {"weights": "a"}),
        ):
            pass
        assert (out / MARK).is_file()
        (out / "file").write_text("whole")
    assert [path.name for path in out.iterdir()] == ["file"]
    with pytest.raises(ConfigError, match="not empty"), filling(out, "decode", {"weights": "a"}):
        pass


def test_what_was_left_half_filled_is_gone_on_with(tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), filling(out, "decode", {"weights": "a"}):
        raise KeyboardInterrupt
    with pytest.raises(ConfigError, match="weights"), filling(out, "decode", {"weights": "b"}):
        pass
    with filling(out, "decode", {"weights": "a"}):
        pass
    assert list(out.iterdir()) == []


def test_ever_fewer_of_millions_of_defects_are_told():
    assert [n for n in range(1, 100_001) if is_told(n)] == [
        1,
        2,
        3,
        4,
        5,
        10,
        100,
        1_000,
        10_000,
        100_000,
    ]
