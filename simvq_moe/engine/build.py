"""The DeepSpeed engine, the same for one process, `deepspeed` and `torchrun`."""

from __future__ import annotations

import importlib
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from simvq_moe.config.schema import Config, OptimizerConfig
from simvq_moe.core.bank import Bank
from simvq_moe.engine.devices import keep_freed_memory
from simvq_moe.engine.optimizer import make_optimizer
from simvq_moe.engine.settings import BUCKET, engine_settings, import_deepspeed
from simvq_moe.engine.sharding import keep_heads, mark_pieces
from simvq_moe.errors import ConfigError
from simvq_moe.moe.routers.base import Router

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def sum(self, x: Tensor) -> Tensor:
        """x added over all ranks, in place; every rank must call it."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, own: T) -> list[T]:
        """What each rank gives, any object that can be pickled; every rank must call it."""
        found = [own] * self.size
        if self.size > 1:
            dist.all_gather_object(found, own)
        return found

    def agree(self, work: Callable[[], T]) -> T:
        """What work returns here, once it has on every rank; every rank must call it.

        Work makes no collective calls, for others may not.

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
        """Work on rank 0 first: what it derives from the data once is then there for the others.

        Raises:
            ConfigError: on every rank, if it was raised on one.
        """
        done = self.agree(lambda: [work()] if self.is_main else [])
        return self.agree(lambda: done[0] if self.is_main else work())


def raise_any(refusals: Sequence[str | None]) -> None:
    """Raise the `ConfigError` that the first of all ranks has to say, if one has."""
    for rank, refusal in enumerate(refusals):
        if refusal is not None:
            raise ConfigError(refusal if rank == 0 else f"rank {rank}: {refusal}")


def launched_ranks() -> int:
    """Number of ranks that a launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Rank that a launcher has given this process; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def share_cores(environ: Mapping[str, str]) -> None:
    """Give each rank of a machine its part of the cores, unless OMP_NUM_THREADS says otherwise.

    torchrun sets that to 1; under `deepspeed` every rank would take all cores, and wait for them.
    """
    ranks = int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or 1)
    if ranks > 1 and "OMP_NUM_THREADS" not in environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))


def start_distributed(timeout_s: float = 0.0) -> World:
    """Join the ranks that the launcher started, or be the only one.

    Args:
        timeout_s: seconds after which another one will have found a hang: no collective call gives
            up before twice that time, or half an hour.
    """
    deepspeed = import_deepspeed()
    timeout = timedelta(seconds=max(1800.0, 2 * timeout_s))
    cuda = torch.cuda.is_available()
    if not cuda:
        keep_freed_memory()
    share_cores(os.environ)
    backend = "nccl" if cuda else "gloo"
    # a process that another has started may inherit its rank, but nobody to meet
    nobody = launched_ranks() == 1 and "MASTER_ADDR" not in os.environ
    if ("RANK" not in os.environ or nobody) and not dist.is_initialized():
        # in this process' memory: there is nobody to meet, and so no file that would be left behind
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
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
    local = int(os.environ.setdefault("LOCAL_RANK", "0"))  # the engine reads it as well
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # objects are exchanged by way of it
    return World(dist.get_rank(), dist.get_world_size(), device)


def make_engine(model: nn.Module, config: Config, world: World) -> Any:
    """A DeepSpeed engine over model: `engine(batch)`, `engine.backward(loss)`, `engine.step()`."""
    deepspeed = import_deepspeed()
    groups = parameter_groups(model, config.optimizer)
    moe = deepspeed.moe.utils
    if any(moe.is_moe_param(p) for p in model.parameters()):
        split = moe.split_params_into_different_moe_groups_for_optimizer(groups)
        groups = [group for group in split if group["params"]]
    settings = engine_settings(config, world.size)
    stage = settings["zero_optimization"]["stage"]
    if stage != config.train.zero_stage:
        logger.info(
            "train.zero_stage %d: %d on one rank, which shards nothing",
            *(config.train.zero_stage, stage),
        )
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # DeepSpeed makes room for a whole bucket in every step, however small the model
    settings["zero_optimization"].setdefault("reduce_bucket_size", min(BUCKET, learned))
    _import_compiler(config.train.compile)
    optimizer = make_optimizer(groups, config.optimizer, settings, world.device)
    sharded = stage == 3
    if sharded:
        mark_pieces(model)
    # DeepSpeed asks of every optimizer whether it is Muon, whose module compiles itself when it is
    # imported: a second of torch's compiler for what is never used
    with _variable("TORCHDYNAMO_DISABLE", "1"):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=partial(_schedule, config=config),
            config=settings,
        )
    if sharded:
        keep_heads(model)
    if stage == 0:
        # alone there is nothing to reduce, only to copy there and back
        engine.enable_backward_allreduce = world.size > 1
        optimizer.register_step_pre_hook(partial(_finish_gradients, engine, config.train.clip))
    return engine


def _import_compiler(compiles: bool) -> None:
    """Every optimizer imports torch's compiler, which makes a folder for its cache in the temporary
    folder, also if nothing is ever compiled: that would be left behind, empty."""
    key = "TORCHINDUCTOR_CACHE_DIR"
    there = (
        nullcontext() if compiles or key in os.environ else _variable(key, tempfile.gettempdir())
    )
    with there:
        importlib.import_module("torch._dynamo")


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """A variable of the environment, for what is only told so."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _finish_gradients(engine: Any, largest: float, *_: Any) -> None:
    """At stage 0 DeepSpeed clips, but tells no norm; and what has no gradient has one of 0 at other
    stages, which still moves Adam's moments."""
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    engine._global_grad_norm = nn.utils.clip_grad_norm_(parameters, largest or math.inf)


def parameter_groups(model: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameters by role: shared maps, routers, matrices, and vectors, which never decay."""
    role = {id(p): "vector" if p.ndim < 2 else "matrix" for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, Router):
            role |= {
                id(p): "router_vector" if p.ndim < 2 else "router" for p in module.parameters()
            }
        if isinstance(rows := getattr(module, "router_rows", None), nn.Parameter):
            role[id(rows)] = "router"  # of DeepSpeed's own layer
        if isinstance(module, Bank):
            role |= {id(p): "map" for p in module.maps}
    settings = {
        "matrix": (1.0, optimizer.weight_decay),
        "vector": (1.0, 0.0),
        "router": (optimizer.router_lr_multiplier, optimizer.weight_decay),
        "router_vector": (optimizer.router_lr_multiplier, 0.0),
        "map": (optimizer.map_lr_multiplier, 0.0),
    }
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, (multiplier, decay) in settings.items():
        members = [p for p in model.parameters() if role[id(p)] == name and p.requires_grad]
        if not members:
            continue
        lr = optimizer.lr * multiplier
        # one group where nothing differs, for every group costs its own collectives a step
        group = groups.setdefault(
            (lr, decay), {"name": name, "params": [], "lr": lr, "weight_decay": decay}
        )
        group["params"] += members
    return list(groups.values())


def learning_rate_factor(step: int, steps: int, optimizer: OptimizerConfig) -> float:
    """Factor on the peak rate for the update after `step` updates: linear warm-up, then cosine."""
    if step < optimizer.warmup_steps:
        return (step + 1) / optimizer.warmup_steps
    span = max(1, steps - 1 - optimizer.warmup_steps)
    done = min(1.0, (step - optimizer.warmup_steps) / span)
    floor = optimizer.final_lr_ratio
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


def _schedule(optimizer: Optimizer, config: Config) -> LambdaLR:
    return LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, config.train.steps, config.optimizer),
    )
