"""Commands in processes of their own that start within milliseconds: forked from one process that
has imported everything, so that a test can start and kill many."""

from __future__ import annotations

import os
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from simvq_moe.cli import main
from simvq_moe.engine.settings import import_deepspeed
from simvq_moe.training import run

assert run
import_deepspeed()


def start(
    *args: str, cwd: Path, log: Path, rank: int = 0, ranks: int = 1, port: int = 0
) -> BaseProcess:
    """`simvq-moe ...` in cwd, which writes to log; the first one takes seconds, for all."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    place = {}
    if ranks > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        place |= {"MASTER_ADDR": "127.0.0.1"}
    process = context.Process(target=_serve, args=(args, cwd, log, place), daemon=True)
    process.start()
    return process


def _serve(args: tuple[str, ...], cwd: Path, log: Path, place: dict[str, str | int]) -> None:
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }
    os.environ |= {name: str(value) for name, value in place.items()}
    os.chdir(cwd)
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    code = 99
    try:
        code = main(args)
    finally:
        os._exit(code)
