"""Folders that a command fills: one that was left half filled is known as that, and the same
command goes on with it.

While it is filled a folder holds unfinished.json, which says what the files are made of; it is
written first and removed last. Every other file appears whole, by `files.written_whole`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from simvq_moe.errors import ConfigError
from simvq_moe.files.locks import alone
from simvq_moe.files.regular import read_json, sync_folder, write_json

MARK = "unfinished.json"
ASIDE = ".tmp-"
"""Beginning of the names of files that are being written."""


def check_free(out: Path) -> None:
    """Raise `ConfigError` if the folder holds what no command has left unfinished."""
    if not out.exists():
        return
    if not out.is_dir() or (_content(out) and not (out / MARK).is_file()):
        raise ConfigError(f"--out {out} is not empty: give a new folder")


@contextmanager
def filling(out: Path, command: str, made_of: Mapping[str, Any]) -> Iterator[None]:
    """Fill a new folder, or go on with one that the same command was filling.

    Args:
        command: its name.
        made_of: whatever decides the bytes of the files: numbers, strings and lists of them.

    Raises:
        ConfigError: the folder holds something else, was to be made of something else, or is being
            filled by another process.
    """
    wanted = {"command": command, **made_of}
    _check(out, wanted)
    out.mkdir(parents=True, exist_ok=True)
    with filled_alone(out):
        _check(out, wanted)  # another process may have filled it meanwhile
        write_json(out / MARK, wanted)
        yield
        for left_over in out.rglob(f"{ASIDE}*"):
            left_over.unlink(missing_ok=True)
        sync_folder(out)
        # the last touch: whoever finds no mark finds all files
        (out / MARK).unlink(missing_ok=True)


def filled_alone(out: Path) -> AbstractContextManager[bool]:
    """Hold a folder, which is there, while this process fills it.

    Raises:
        ConfigError: another process is filling it.
    """
    return alone(
        out,
        f"--out {out} is being filled by another process: wait for it, or give a new folder",
    )


def _check(out: Path, wanted: Mapping[str, Any]) -> None:
    check_free(out)
    if not (out / MARK).is_file():
        return
    found = read_json(out / MARK, dict)
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise ConfigError(
                f"--out {out} was being filled by another command ({key} was "
                f"{found.get(key)!r} and is now {wanted.get(key)!r}): give a new folder, or "
                "remove it"
            )


def _content(folder: Path) -> list[Path]:
    """What is in it, but for a file that a command was about to write first."""
    return [path for path in folder.iterdir() if path.name != f"{ASIDE}{MARK}"]
