"""Engines of ranks of many, each in a process of its own whose collective calls do nothing."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.engine.build import import_compiler, make_engine
from simvq_moe.engine.pieces import Piece, held_pieces, own_share
from simvq_moe.engine.settings import import_deepspeed
from simvq_moe.engine.world import World
from simvq_moe.moe.expert_parallel import make_groups
from simvq_moe.tasks.registry import build_model


class Rank(NamedTuple):
    """One of many ranks, and what it trains."""

    rank: int
    ranks: int
    flags: tuple[str, ...]


class Part(NamedTuple):
    """Elements of one tensor."""

    key: str
    start: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the whole tensor."""

    @property
    def bytes(self) -> int:
        return self.length * self.dtype.itemsize


class Parts(NamedTuple):
    """What one rank has to do with a checkpoint."""

    written: list[Part]
    held: list[Part]


def parts_of(rank: Rank) -> Parts:
    """What this rank writes into a checkpoint, and what it reads."""
    os.environ |= {"RANK": str(rank.rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(rank.ranks)}
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=rank.rank, world_size=rank.ranks, store=FakeStore())
    import_deepspeed().init_distributed("fake", auto_mpi_discovery=False)
    config = with_flags(Config(), rank.flags, "train")
    if config.moe.expert_parallel > 1:
        make_groups(config.moe.expert_parallel)
    world = World(rank.rank, rank.ranks, torch.device("cpu"))
    engine = make_engine(build_model(config), config, world)
    held = held_pieces(engine)
    return Parts(_described(own_share(held)), _described(held))


def _described(pieces: list[Piece]) -> list[Part]:
    return [Part(p.key, p.start, len(p.data), p.data.dtype, p.shape) for p in pieces]


def parts_of_all(ranks: list[Rank]) -> list[Parts]:
    """What each of these ranks writes and reads."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_in_forks, ranks).result()


def _in_forks(ranks: list[Rank]) -> list[Parts]:
    # forks share the imports, which take longer than all else
    torch.set_num_threads(1)
    import_deepspeed()
    import_compiler(compiles=False)
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return pool.map(parts_of, ranks, chunksize=1)
