"""The DeepSpeed engine, the same for one process, `deepspeed` and `torchrun`."""

from __future__ import annotations

import importlib
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from simvq_moe.config.schema import Config
from simvq_moe.engine.muon import MuonOfRouters
from simvq_moe.engine.optimizer import make_optimizer, make_schedule, parameter_groups
from simvq_moe.engine.settings import BUCKET, engine_settings, import_deepspeed
from simvq_moe.engine.sharding import hand_over, keep_heads, mark_pieces
from simvq_moe.engine.world import World

logger = logging.getLogger(__name__)


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
            config.train.zero_stage,
            stage,
        )
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # DeepSpeed makes room for a whole bucket in every step, however small the model
    settings["zero_optimization"].setdefault("reduce_bucket_size", min(BUCKET, learned))
    import_compiler(compiles=config.train.compile)
    optimizer = make_optimizer(groups, config.optimizer, settings, world.device)
    sharded = stage == 3
    if sharded:
        mark_pieces(model)
        hand_over(model, settings)
    # DeepSpeed asks of every optimizer whether it is Muon, whose module compiles itself when it is
    # imported: a second of torch's compiler for what is never used
    with _variable("TORCHDYNAMO_DISABLE", "1"), _same_stage_in_bf16(deepspeed):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=partial(make_schedule, config=config),
            config=settings,
        )
    if sharded:
        keep_heads(model)
    if stage == 0:
        # alone there is nothing to reduce, only to copy there and back
        engine.enable_backward_allreduce = world.size > 1
        optimizer.register_step_pre_hook(partial(_finish_gradients, engine, config.train.clip))
        MuonOfRouters(optimizer)
    return engine


def import_compiler(*, compiles: bool) -> None:
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


@contextmanager
def _same_stage_in_bf16(deepspeed: Any) -> Iterator[None]:
    """At stage 1, with gradients in float32, DeepSpeed takes an optimizer for bfloat16 that was
    made for pipelines. That of stages 1 and 2 adds up in float32 as well, and has the state that
    checkpoints know."""
    engine = deepspeed.DeepSpeedEngine
    check = engine._do_optimizer_sanity_check

    def kind(self: Any, optimizer: Any) -> Any:
        found = check(self, optimizer)
        return "zero_optimization" if self.zero_optimization() else found

    engine._do_optimizer_sanity_check = kind
    try:
        yield
    finally:
        engine._do_optimizer_sanity_check = check


def _finish_gradients(engine: Any, largest: float, *_: Any) -> None:
    """At stage 0 DeepSpeed clips, but tells no norm; and what has no gradient has one of 0 at other
    stages, which still moves Adam's moments."""
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    engine._global_grad_norm = nn.utils.clip_grad_norm_(parameters, largest or math.inf)
