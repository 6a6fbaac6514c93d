"""The ranks of a run: how this process joins them, and what they tell each other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from simvq_moe.engine.devices import keep_freed_memory
from simvq_moe.engine.elastic import agent_store
from simvq_moe.engine.launched import launched_rank, launched_ranks, number_of
from simvq_moe.engine.settings import import_deepspeed
from simvq_moe.errors import ConfigError

T = TypeVar("T")

SECONDS_BETWEEN_LOOKS = 0.05
"""How long a rank that waits for another one's work sleeps."""


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """The group by which ranks exchange; None: the one that all of torch uses."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier(self.group)

    def sum(self, x: Tensor) -> Tensor:
        """x added over all ranks, in place; every rank must call it."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, own: T) -> list[T]:
        """What each rank gives, any object that can be pickled; every rank must call it."""
        found = [own] * self.size
        if self.size > 1:
            dist.all_gather_object(found, own, self.group)
        return found

    def aside(self, timeout_s: float = 0.0) -> World:
        """The same ranks for another thread, whose exchanges go on beside all others, by way of the
        CPU; every rank must call it.

        Args:
            timeout_s: see `start_distributed`.
        """
        group = dist.new_group(timeout=_patience(timeout_s), backend="gloo")
        return replace(self, group=group)

    def agree(self, work: Callable[[], T]) -> T:
        """What work returns here, once it has on every rank; every rank must call it.

        Work makes no collective calls, because others may make none.

        Raises:
            ConfigError: on every rank, if it was raised on one.
        """
        result: T | None = None
        refusal = None
        try:
            result = work()
        except ConfigError as error:
            refusal = str(error)
        raise_any(self.gather(refusal))
        return result  # pyright: ignore[reportReturnType]

    def main_first(self, work: Callable[[], T]) -> T:
        """Work on rank 0 first: what it derives from the data once is then there for the others,
        which wait for as long as it takes.

        Raises:
            ConfigError: on every rank, if it was raised on one.
        """
        if self.size == 1:
            return work()
        store = dist.distributed_c10d._get_default_store()
        turn = store.add(f"simvq_moe/turns/{self.rank}", 1)  # the same one on every rank
        over = f"simvq_moe/turn/{turn}/over"

        def first() -> list[T]:
            # a collective call would give up after a while; a store that rank 0 took along raises
            while not self.is_main and not store.check([over]):
                time.sleep(SECONDS_BETWEEN_LOOKS)
            if not self.is_main:
                return []
            try:
                return [work()]
            finally:
                store.set(over, "")

        done = self.agree(first)
        return self.agree(lambda: done[0] if self.is_main else work())


def raise_any(refusals: Sequence[str | None]) -> None:
    """Raise the `ConfigError` that the first of all ranks has to say, if one has."""
    for rank, refusal in enumerate(refusals):
        if refusal is not None:
            raise ConfigError(refusal if rank == 0 else f"rank {rank}: {refusal}")


def share_cores(environ: Mapping[str, str]) -> None:
    """Give each rank of a machine its part of the cores, unless OMP_NUM_THREADS says otherwise.

    torchrun sets that to 1; under `deepspeed` every rank would take all cores, and wait for them.
    SLURM may say how many each has, and has bound it to these or not.
    """
    if "OMP_NUM_THREADS" in environ:
        return
    if own := number_of(environ, "SLURM_CPUS_PER_TASK"):
        torch.set_num_threads(min(own, torch.get_num_threads()))
        return
    ranks = number_of(environ, "LOCAL_WORLD_SIZE") or number_of(environ, "LOCAL_SIZE")
    if ranks > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))


def start_distributed(timeout_s: float = 0.0) -> World:
    """Join the ranks that the launcher started, or be the only one.

    Args:
        timeout_s: seconds after which another one will have found a hang: no collective call gives
            up before twice that time, or half an hour.
    """
    deepspeed = import_deepspeed()
    timeout = _patience(timeout_s)
    cuda = torch.cuda.is_available()
    if not cuda:
        keep_freed_memory()
    share_cores(os.environ)
    backend = "nccl" if cuda else "gloo"
    local = max(0, number_of(os.environ, "LOCAL_RANK", least=-1))
    os.environ["LOCAL_RANK"] = str(local)  # the engine reads it as well
    for name in ("RANK", "WORLD_SIZE"):
        if not os.environ.get(name):  # an empty one says nothing, and is no number for others
            os.environ.pop(name, None)
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    # a process that another has started may inherit its rank, but nobody to meet
    nobody = "MASTER_ADDR" not in os.environ or number_of(os.environ, "RANK") > 0
    nobody = nobody and launched_ranks() == 1
    if ("RANK" not in os.environ or nobody) and not dist.is_initialized():
        # in this process' memory: there is nobody to meet, and so no file that would be left behind
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    elif not dist.is_initialized() and (store := agent_store(os.environ, timeout)):
        dist.init_process_group(
            backend,
            store=store,
            rank=launched_rank(),
            world_size=launched_ranks(),
            timeout=timeout,
            device_id=device if cuda else None,  # as DeepSpeed does it
        )
    try:
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        raise ConfigError(
            f"MASTER_PORT {port} of this machine is taken, by another run perhaps: give the "
            "launcher a free one (deepspeed --master_port, torchrun --master-port)"
        ) from None
    if cuda:
        torch.cuda.set_device(device)  # objects are exchanged by way of it
    return World(dist.get_rank(), dist.get_world_size(), device)


def _patience(timeout_s: float) -> timedelta:
    """How long a collective call waits for the others."""
    return timedelta(seconds=max(1800.0, 2 * timeout_s))
