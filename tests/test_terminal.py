"""What the machine does to a command is one line, and no traceback."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from simvq_moe.errors import ConfigError
from simvq_moe.terminal import ending
from tests.launching import environment

PROGRAM = (sys.executable, "-m", "simvq_moe")


def shell(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Of a script that calls the program "$@"; buffered as where nobody has asked for less."""
    env = environment() | {"PYTHONUNBUFFERED": ""} | variables
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {script}", "bash", *PROGRAM],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("variables", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_a_reader_that_leaves_early_ends_the_command_quietly(variables: dict[str, str]) -> None:
    done = shell('"$@" train --help | true', **variables)
    assert done.stderr == ""
    assert done.returncode in (0, 1)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ('"$@" --help > /dev/full', 1),
        ('"$@" nonsense 2>&1 | true', 2),
        ('"$@" --help <&- >&- 2>&-', 0),
    ],
)
def test_streams_that_are_full_or_closed_are_no_traceback(script: str, code: int) -> None:
    done = shell(script)
    assert done.returncode == code
    assert done.stderr.count("\n") == (1 if "full" in script else 0), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("data.source 'a\x1b[31m\nb'"), 2, "data.source 'a\\x1b[31m\\nb'"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "out: Permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", b"f/o"), 2, "f/o: Not a directory"),
        (OSError(errno.EXDEV, "Not here", "a", None, "b"), 1, "b: Not here"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_failures_of_the_system_are_one_line_and_its_exit_code(
    error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(raising(error)) == code
    assert capsys.readouterr().err == f"simvq-moe: {line}\n"
    assert ending(raising(error), told=lambda: False) == code
    assert capsys.readouterr().err == ""


def test_an_error_of_our_own_making_keeps_its_traceback() -> None:
    for error in (ConnectionError("no file, no disk"), RuntimeError("a mistake")):
        with pytest.raises(type(error)):
            ending(raising(error))
    assert ending(raising(KeyboardInterrupt())) == 130


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


def test_a_character_that_the_encoding_lacks_is_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with io.TextIOWrapper((tmp_path / "out").open("wb"), encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert ending(lambda: print("café \udcff") or 0) == 0
        monkeypatch.undo()
    assert (tmp_path / "out").read_bytes() == b"caf\\xe9 \\udcff" + os.linesep.encode()
