"""One process at a time has a folder."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from simvq_moe.errors import ConfigError
from simvq_moe.files.locks import alone
from simvq_moe.files.regular import is_told
from simvq_moe.files.unfinished import MARK, filling


def test_a_lock_that_is_held_is_refused_and_leaves_nothing(tmp_path: Path):
    file = tmp_path / "lock"
    with alone(file, "taken"), pytest.raises(ConfigError, match="taken"), alone(file, "taken"):
        pass
    assert not file.exists()
    with alone(file, "taken"):
        assert file.exists()


def test_a_file_system_without_locks_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with alone(tmp_path / "lock", "taken"):
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
