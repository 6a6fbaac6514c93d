"""What can't run, or not together, found before anything is written.

Each problem is a `ConfigError`: one line that names the key, the value and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator

from simvq_moe.config.checks_moe import moe_problems, with_gates
from simvq_moe.config.checks_tokenizers import audio_problems, image_problems
from simvq_moe.config.checks_values import value_problems
from simvq_moe.config.registry import components
from simvq_moe.config.schema import Config, DataConfig, TrainConfig
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
    lm = config.language_model
    yield from moe_problems(config)
    if lm.width % lm.heads or (lm.width // lm.heads) % 2:
        yield (
            f"language_model.width {lm.width} / language_model.heads {lm.heads} must be a whole "
            "even number for rotary positions: change one of them"
        )
    if lm.moe_every > lm.layers:
        yield (
            f"language_model.moe_every {lm.moe_every} > language_model.layers {lm.layers}: no "
            "block would have a mixture: lower it, or use 0 for dense blocks"
        )
    yield from _speed_problems(config.train)
    for name in ("activation_checkpointing", "compile"):
        if getattr(config.train, name) and config.task != "language_model":
            yield f"train.{name} True with task {config.task!r}: only 'language_model' has it"
    yield from zero_problems(config)
    for key, options in components(config):
        yield from options.problems(key, config)
    yield from image_problems(config)
    yield from audio_problems(config)
    yield from _text_problems(config)


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
    train, moe, stage = config.train, config.moe, config.train.zero_stage
    mixtures = config.task == "language_model" and config.language_model.moe_every > 0
    split = mixtures and moe.expert_parallel > 1
    native = mixtures and moe.dispatch == "deepspeed_capacity"
    if stage == 0 and train.dtype != "fp32":
        yield (
            f"train.zero_stage 0 with train.dtype {train.dtype!r}: DeepSpeed's optimizer there "
            "takes a step before the first one: use train.zero_stage 1"
        )
    if stage == 0 and split:
        yield (
            f"train.zero_stage 0 with moe.expert_parallel {moe.expert_parallel}: DeepSpeed's norm "
            "there leaves out the experts of other ranks: use train.zero_stage 1 or 2"
        )
    if stage == 0 and train.on_not_finite == "skip":
        yield (
            "train.zero_stage 0 with train.on_not_finite 'skip': DeepSpeed steps there whatever "
            "the gradients are: use train.zero_stage 1"
        )
    if stage != 3:
        return
    if split or native:
        key = f"expert_parallel {moe.expert_parallel}" if split else f"dispatch {moe.dispatch!r}"
        yield (
            f"train.zero_stage 3 with moe.{key}: DeepSpeed shards no parameters of such experts: "
            "use train.zero_stage 2"
        )
    if config.task in ("image_tokenizer", "audio_tokenizer"):
        weight = getattr(config, config.task).adversarial_weight
        if weight:
            yield (
                f"train.zero_stage 3 with {config.task}.adversarial_weight {weight}: DeepSpeed "
                "can't gather discriminators that are held fixed in the same step: use "
                "train.zero_stage 2"
            )
    if train.compile:
        yield (
            "train.zero_stage 3 with train.compile True: compiled blocks would keep gathered "
            "parameters: use train.zero_stage 2, or drop train.compile"
        )


OF_TEXT = ("tokenizer", "document_mask", "streaming", "on_corrupt")
OF_STREAMS = (
    *("sources", "source_weights", "held_out_share", "held_out_documents", "shuffle_buffer"),
)
"""Options of the data that mean nothing to other tasks, and without data.streaming."""


def _text_problems(config: Config) -> Iterator[str]:
    data, default = config.data, DataConfig()
    for name in OF_TEXT:
        if config.task != "language_model" and getattr(data, name) != getattr(default, name):
            yield (
                f"data.{name} {getattr(data, name)!r} with task {config.task!r}: only "
                "'language_model' has it: drop it"
            )
    for name in OF_STREAMS:
        if not data.streaming and getattr(data, name) != getattr(default, name):
            yield (
                f"data.{name} {getattr(data, name)!r} means nothing with data.streaming False: "
                "drop it, or set data.streaming to True"
            )
    if data.sources and data.source is not None:
        yield (
            f"data.source {data.source!r} with data.sources {data.sources}: add it to "
            "data.sources, or drop one of them (--data.source None)"
        )
    weights = data.source_weights
    if weights and (len(weights) != len(data.sources) or not min(weights) > 0):
        yield (
            f"data.source_weights {weights} with data.sources {data.sources}: give as many, each "
            "above 0"
        )
    if not 0 < data.held_out_share < 1:
        yield f"data.held_out_share {data.held_out_share}: use more than 0 and less than 1"
