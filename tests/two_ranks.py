"""Two ranks in processes of their own, which start once and then do the work of many tests.

They are forked from the process that has imported everything, see `launching.Forked`.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from simvq_moe.engine.world import start_distributed
from simvq_moe.forked_run import IMPORTS

LONGEST_S = 300
"""Seconds after which a rank that has not answered hangs."""


class TwoRanks:
    """Called with a function of a `World` and its further arguments, which both ranks call: what
    each of them returns, no tensors. A rank that fails ends both, for the other may wait for it.

    Args:
        folder: where the ranks meet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.starts = folder, 0
        self.processes: list[ForkServerProcess] = []
        self.ends: list[Connection] = []

    def __call__(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        if not self.ends:
            self._start()
        for end in self.ends:
            end.send((work, args))
        answers: dict[Any, Any] = {}
        try:
            while len(answers) < len(self.ends):
                ready = wait([end for end in self.ends if end not in answers], timeout=LONGEST_S)
                assert ready, f"no answer after {LONGEST_S} s"
                for end in self.ends:
                    if end in ready:
                        answers[end], error = end.recv()
                        assert error is None, error
        except (AssertionError, EOFError):
            self.close()
            raise
        return [answers[end] for end in self.ends]

    def close(self) -> None:
        """End both."""
        for process, end in zip(self.processes, self.ends, strict=True):
            process.kill()
            process.join()
            end.close()
        self.processes, self.ends = [], []

    def _start(self) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload([IMPORTS])
        self.starts += 1
        for rank in range(2):
            ours, theirs = context.Pipe()
            store = self.folder / f"store{self.starts}"
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()  # so that nothing holds the pipe open when the process ends
            self.processes.append(process)
            self.ends.append(ours)


def _serve(rank: int, store: Path, end: Connection) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=2)
    world = start_distributed()
    with contextlib.suppress(EOFError):
        while True:
            work, args = end.recv()
            try:
                end.send((work(world, *args), None))
            except BaseException:
                end.send((None, traceback.format_exc()))
