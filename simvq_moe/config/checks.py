"""What can't run, or not together, found before anything is written.

Each problem is a `ConfigError`: one line that names the key, the value and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator

from simvq_moe.config.checks_moe import moe_problems, with_gates
from simvq_moe.config.checks_values import value_problems
from simvq_moe.config.registry import components
from simvq_moe.config.schema import Config, TrainConfig
from simvq_moe.config.tasks import task_of, task_problems
from simvq_moe.errors import ConfigError

PROFILED_STEPS = 6
"""Steps after which a trace of train.profile is written."""


def check(config: Config) -> None:
    """Raise `ConfigError` for a config that can't run, whatever the number of ranks."""
    for message in _problems(config):
        raise ConfigError(message)


def check_ranks(config: Config, world_size: int) -> None:
    """Raise `ConfigError` where the global batch or the experts do not divide over the ranks."""
    if world_size % config.moe.expert_parallel:
        raise ConfigError(
            f"moe.expert_parallel {config.moe.expert_parallel} does not divide {world_size} "
            f"rank{'' if world_size == 1 else 's'}: launch a multiple of it, or lower it"
        )
    parts = world_size * config.train.accumulation
    if config.train.batch_size % parts:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} does not divide by {world_size} ranks x "
            f"train.accumulation {config.train.accumulation} = {parts}: "
            f"use a multiple of {parts}, or another number of ranks"
        )


def _problems(config: Config) -> Iterator[str]:
    yield from value_problems(config)
    config = with_gates(config)
    yield from moe_problems(config)
    yield from _speed_problems(config.train)
    yield from zero_problems(config)
    for key, options in components(config):
        yield from options.problems(key, config)
    yield from task_problems(config)


def _speed_problems(train: TrainConfig) -> Iterator[str]:
    if train.profile and train.steps < PROFILED_STEPS:
        yield (
            f"train.profile True with train.steps {train.steps}: a trace takes {PROFILED_STEPS} "
            "steps: raise train.steps"
        )
    if train.peak_flops is not None and not train.peak_flops > 0:
        yield (
            f"train.peak_flops {train.peak_flops}: give floating-point operations a second, such "
            "as 989e12, or drop it"
        )


def zero_problems(config: Config) -> Iterator[str]:
    """What DeepSpeed's stage 0 gets wrong, and what its stage 3 can't gather."""
    train, stage = config.train, config.train.zero_stage
    if stage == 0 and train.dtype != "fp32":
        yield (
            f"train.zero_stage 0 with train.dtype {train.dtype!r}: DeepSpeed's optimizer there "
            "takes a step before the first one: use train.zero_stage 1"
        )
    if stage == 0 and train.on_not_finite == "skip":
        yield (
            "train.zero_stage 0 with train.on_not_finite 'skip': DeepSpeed steps there whatever "
            "the gradients are: use train.zero_stage 1"
        )
    if stage and config.optimizer.router == "muon":
        yield (
            f"optimizer.router 'muon' with train.zero_stage {stage}: Muon steps whole "
            "matrices, which ZeRO cuts: use train.zero_stage 0"
        )
    yield from task_of(config).stage_problems(config)
    if stage == 3 and train.compile:
        yield (
            "train.zero_stage 3 with train.compile True: compiled blocks would keep gathered "
            "parameters: use train.zero_stage 2, or drop train.compile"
        )
