"""Folders of the cache: built aside, then renamed into place, so that nobody sees half of one."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from simvq_moe.data.rows.base import CorruptDataError
from simvq_moe.errors import ConfigError
from simvq_moe.files.locks import alone, in_turn
from simvq_moe.files.regular import sync, sync_folder

log = logging.getLogger(__name__)

BUILDING = "building-"
"""Beginning of the name of a folder that is being built in the cache; its builder holds it."""
SECONDS_TO_BUILD = 7 * 86_400.0
"""After which a folder without a lock is taken for left over."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Failures of writing that name no file."""


def build_once(folder: Path, fill: Callable[[Path, Path], None], doing: str) -> None:
    """Make a folder of the cache, unless it is there.

    Args:
        fill: writes into its first argument, and what is needed for that into the second.
        doing: what that is, for the log.
    """
    if folder.exists():
        return
    log.info("%s into %s", doing, folder)
    fresh = not folder.parent.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _aside(folder.parent) as aside, _quiet():
            built = Path(aside, "built")
            built.mkdir()
            fill(built, Path(aside, "scratch"))
            for path in built.rglob("*"):
                if path.is_file():
                    with path.open("rb+") as file:
                        sync(file.fileno())
            sync_folder(built)
            try:
                built.rename(folder)
            except OSError:
                # another process was faster, and its folder is as good
                if not folder.exists():
                    raise
            sync_folder(folder.parent)
    except (ConfigError, CorruptDataError):
        if fresh:
            with suppress(OSError):
                folder.parent.rmdir()
        raise
    except OSError as error:
        if error.filename is None and error.errno in FULL:
            raise OSError(error.errno, os.strerror(error.errno), str(folder.parent)) from error
        raise


@contextmanager
def _aside(cache: Path) -> Iterator[Path]:
    """A folder to build in, held by this process; what ended processes were building is removed.

    It is made and held in one turn of the cache: between the two it would look left over.
    """
    with ExitStack() as kept:
        with in_turn(cache):
            _remove_left_over(cache)
            made = tempfile.TemporaryDirectory(prefix=BUILDING, dir=cache)
            aside = Path(kept.enter_context(made))
            kept.enter_context(in_turn(aside))
        yield aside


def _remove_left_over(cache: Path) -> None:
    """Remove what processes that have ended were building: a living one holds its folder."""
    for aside in cache.glob(f"{BUILDING}*"):
        with suppress(ConfigError, OSError), alone(aside, "it is being built") as held:
            if held or time.time() - aside.stat().st_mtime > SECONDS_TO_BUILD:
                shutil.rmtree(aside)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`, which are its own global switch."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
