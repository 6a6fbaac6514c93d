"""Kill work in a process of its own at any moment at which it touches a file of a folder."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOUCHES = {"open", "os.rename", "os.mkdir", "os.remove"}
KILLED = 99


def killed_at(number: int, folder: Path, work: Callable[[], Any]) -> bool:
    """Do the work, and kill it the number-th time that it touches a file of the folder.

    Returns whether it came so far; otherwise it has ended by itself, and well.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which torch does not use
        pid = os.fork()
    if pid == 0:
        gc.disable()  # it would copy every page that the two processes share
        touched = itertools.count()

        def watch(event: str, args: tuple[Any, ...]) -> None:
            ours = event in TOUCHES and str(args[0]).startswith(str(folder))
            if ours and next(touched) == number:
                os._exit(KILLED)

        sys.addaudithook(watch)
        code = 1
        try:
            code = work() or 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, KILLED), f"the work ended with {code}"
    return code == KILLED
