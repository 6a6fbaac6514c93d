"""The same work on several ranks, processes of one thread each on this machine."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from simvq_moe.engine.world import start_distributed
from simvq_moe.errors import ConfigError
from simvq_moe.sweeps.machine import free_port


def on_ranks(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What work(world, *args) returns on each rank, anything that JSON has.

    Raises:
        ConfigError: that of a rank.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            start_processes(
                _on_this_rank,
                (size, free_port(), folder, work, args),
                nprocs=size,
                start_method="spawn",
            )
        except ProcessExitedException:
            for said in folder.glob("*.error"):
                raise ConfigError(said.read_text()) from None
            raise
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def _on_this_rank(
    rank: int, size: int, port: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    try:
        found = work(start_distributed(), *args)
    except ConfigError as error:
        (folder / f"{rank}.error").write_text(str(error))
        sys.exit(1)  # which ends the others, that may be waiting
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
