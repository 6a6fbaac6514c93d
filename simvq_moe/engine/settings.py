"""DeepSpeed, imported quietly, and its settings: those of the config, and a user's own on top.

DeepSpeed takes an unknown key without a word, so the keys of the file are checked here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from simvq_moe.config.checks import zero_problems
from simvq_moe.config.loading import suggestion
from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import BrokenFileError, MissingFileError, parse_json, read_text

BUCKET = 500_000_000
"""Most gradients that are reduced at once (zero_optimization.reduce_bucket_size)."""
LIMIT = 2**20
"""Bytes of a user's own settings that are read at most."""
NEVER = 1_000_000_000
"""Steps between DeepSpeed's own log lines."""

GRADIENTS_IN_FP32 = {
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}
"""Gradients of micro-batches and of ranks are added up in more than bfloat16's 8 bits: by default
DeepSpeed would add up, and reduce, in the precision of the model."""

DECIDED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.accumulation",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.clip",
    "zero_optimization.stage": "train.zero_stage",
    "bf16": "train.dtype",
    "fp16": "train.dtype",
    "torch_autocast": "train.dtype",
    "optimizer": "the section optimizer",
    "scheduler": "the section optimizer",
    "steps_per_print": "train.log_every",
    "expert_parallel": "moe.expert_parallel",
    "use_data_before_expert_parallelism": "moe.expert_parallel",
}
"""Keys of DeepSpeed that follow from the config, and from what in it."""

FREE = (
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor"),
    *("gradient_allreduce_op", "disable_allgather", "data_types", "aio", "compile"),
    *("comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "log_level"),
    *("dump_state", "disable_python_gc", "tensorboard", "wandb", "comet", "csv_monitor"),
)
"""Keys that a user's file may set."""


def import_deepspeed() -> ModuleType:
    """The deepspeed package, told beforehand what it would otherwise guess aloud."""
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    if not cuda:
        # inference only, compiles C++ at start-up and hangs on a stale lock if that was killed
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def zero_stage(config: Config, ranks: int) -> int:
    """The stage that runs: on one rank 1 and 2 shard nothing, but copy every gradient and weight,
    so stage 0 takes their place wherever it is right."""
    train = config.train
    if ranks > 1 or train.zero_stage == 3 or train.deepspeed_config is not None:
        return train.zero_stage
    whole = replace(config, train=replace(train, zero_stage=0))
    return train.zero_stage if any(zero_problems(whole)) else 0


def engine_settings(config: Config, ranks: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Args:
        ranks: number of them.

    Raises:
        ConfigError: train.deepspeed_config is no JSON object, or sets what it may not.
    """
    train, stage = config.train, zero_stage(config, ranks)
    ours: dict[str, Any] = {
        "train_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        # at stage 0 the engine's norm is ours, and clipping with it
        "gradient_clipping": train.clip if stage else 0.0,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": train.dtype == "bf16"},
        "fp16": {"enabled": train.dtype == "fp16"},  # with a dynamic scale of the loss
        **(GRADIENTS_IN_FP32 if train.dtype == "bf16" else {}),
        "steps_per_print": NEVER,
    }
    if train.deepspeed_config is None:
        return ours
    theirs = _read(Path(train.deepspeed_config))
    if train.zero_stage == 0 and "zero_optimization" in theirs:
        raise ConfigError(
            f"train.deepspeed_config {train.deepspeed_config!r} sets 'zero_optimization', which "
            "train.zero_stage 0 switches off: drop it there, or use train.zero_stage 1"
        )
    zero = ours["zero_optimization"] | theirs.get("zero_optimization", {})
    return ours | theirs | {"zero_optimization": zero}


def check_device(config: Config) -> None:
    """Raise `ConfigError` for a precision that this machine's devices don't train in."""
    if config.train.dtype == "fp16" and not torch.cuda.is_available():
        raise ConfigError(
            "train.dtype 'fp16' needs a GPU, and there is none here: use 'bf16' or 'fp32'"
        )


def _read(path: Path) -> dict[str, Any]:
    key = f"train.deepspeed_config {str(path)!r}"
    try:
        text = read_text(path, limit=LIMIT)
    except MissingFileError:
        raise ConfigError(f"{key}: No such file or directory: give a JSON file") from None
    except BrokenFileError as error:
        raise ConfigError(f"{key} {error.reason}: give a JSON file") from None
    try:
        settings = parse_json(text, path)
    except BrokenFileError as error:
        raise ConfigError(f"{key} is no JSON: {error.reason}") from None
    zero = settings.get("zero_optimization", {}) if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(zero, dict):
        raise ConfigError(
            f"{key}: DeepSpeed's settings, and zero_optimization in them, are objects"
        )
    for name in [*settings, *(f"zero_optimization.{name}" for name in zero)]:
        if name in DECIDED:
            raise ConfigError(f"{key} sets {name!r}, which {DECIDED[name]} decides: drop it there")
        if "." not in name and name not in FREE:
            near = suggestion(name, FREE)
            raise ConfigError(f"{key}: DeepSpeed has no setting {name!r}: drop it.{near}")
    _check_zero(key, zero)
    return settings


def _check_zero(key: str, zero: Mapping[str, Any]) -> None:
    from pydantic import ValidationError

    try:
        import_deepspeed().runtime.zero.config.DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(("zero_optimization", *map(str, first["loc"])))
        raise ConfigError(f"{key}: {where}: {first['msg']}") from error
