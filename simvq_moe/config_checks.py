"""What can't run, or not together, found before anything is written.

Each problem is a `ConfigError`: one line that names the key, the value and the way out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from math import prod

from simvq_moe.config import (
    AudioTokenizerConfig,
    Config,
    DataConfig,
    ImageTokenizerConfig,
    MoEConfig,
    QuantizerConfig,
    TrainConfig,
)
from simvq_moe.data.codes import is_codes
from simvq_moe.merging import ConfigError, flatten

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
    yield from _below_minimum(config)
    moe, lm, q = config.moe, config.language_model, config.quantizer
    if moe.top_k > moe.experts:
        yield (
            f"moe.top_k {moe.top_k} > moe.experts {moe.experts}: "
            "lower moe.top_k or raise moe.experts"
        )
    if moe.dispatch == "deepspeed_capacity":
        yield from _baseline_problems(moe)
    yield from _router_problems(moe)
    if moe.experts % moe.expert_parallel:
        yield (
            f"moe.experts {moe.experts} does not divide by moe.expert_parallel "
            f"{moe.expert_parallel}: change one of them"
        )
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
    if lm.moe_every == 0:
        for name in ("router", "router_map", "expert_out_map", "expert_in_map", "balance"):
            value, default = getattr(moe, name), getattr(MoEConfig(), name)
            if value != default:
                yield (
                    f"moe.{name} {value!r} with language_model.moe_every 0, which leaves no "
                    "mixture: drop it, or use 1"
                )
    yield from _speed_problems(config.train)
    for name in ("activation_checkpointing", "compile"):
        if getattr(config.train, name) and config.task != "language_model":
            yield f"train.{name} True with task {config.task!r}: only 'language_model' has it"
    yield from _zero_problems(config)
    yield from _quantizer_problems(q)
    if q.kind == "simvq" and q.transform != "linear" and q.base_width not in (None, q.width):
        yield (
            f"quantizer.base_width {q.base_width} != quantizer.width {q.width} with "
            f"quantizer.transform {q.transform!r}: only 'linear' changes the width"
        )
    rows = lm.width
    if moe.router == "cosine":
        rows = moe.router_projection or max(1, moe.experts // 2)
    if moe.router_map != "linear" and moe.router_base_width not in (None, rows):
        yield (
            f"moe.router_base_width {moe.router_base_width} with moe.router_map "
            f"{moe.router_map!r}: set moe.router_map to 'linear' or drop it"
        )
    yield from _image_problems(config)
    yield from _audio_problems(config)
    yield from _text_problems(config)
    if not re.fullmatch(r"[\w.+=-]+(/[\w.+=-]+)*", config.name) or ".." in config.name.split("/"):
        yield f"name {config.name!r}: use letters, digits and . _ + = -, with / between folders"


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


def _zero_problems(config: Config) -> Iterator[str]:
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


OF_DEEPSPEED = {
    *("experts", "top_k", "hidden", "expert", "capacity_factor", "gates", "dispatch", "balance"),
    *("balance_weight", "z_loss_weight"),
}
"""Options that DeepSpeed's own layer has as well."""


def _baseline_problems(moe: MoEConfig) -> Iterator[str]:
    for name, default in asdict(MoEConfig()).items():
        value = getattr(moe, name)
        if name not in OF_DEEPSPEED and value != default:
            yield (
                f"moe.{name} {value} with moe.dispatch 'deepspeed_capacity': DeepSpeed's layer has "
                "no such option: drop it, or use moe.dispatch 'sorted'"
            )
    if moe.balance not in ("none", "aux"):
        yield (
            f"moe.balance {moe.balance!r} with moe.dispatch 'deepspeed_capacity': use 'none' or "
            "'aux', or moe.dispatch 'sorted'"
        )
    convention = "topk_softmax" if moe.top_k > 1 else "softmax_topk"
    if moe.gates != convention:
        yield (
            f"moe.gates {moe.gates!r} with moe.dispatch 'deepspeed_capacity' and moe.top_k "
            f"{moe.top_k}: DeepSpeed's gates are {convention!r}: set that"
        )


OF_ROWS = ("topk", "noisy_topk", "cosine", "distance", "expert_choice")
SCORING = (*OF_ROWS, "hyper", "self_selecting")
OF_ROUTERS = {
    "router_map": OF_ROWS,
    "router_base_width": OF_ROWS,
    "train_router_base": (*OF_ROWS, "self_selecting"),
    "router_projection": ("cosine",),
    "router_codebook_weight": ("distance",),
    "router_commitment_weight": ("distance",),
    "router_init": ("distance", "self_selecting"),
    "self_selecting_rank": ("self_selecting",),
    "centre_router_input": SCORING,
    "z_loss_weight": SCORING,
    "balance": tuple(kind for kind in SCORING if kind != "expert_choice"),
    "capacity_factor": (*(kind for kind in SCORING if kind != "expert_choice"), "hash"),
}
"""Routers that have the option; for others only its default is accepted."""


def _router_problems(moe: MoEConfig) -> Iterator[str]:
    for name, kinds in OF_ROUTERS.items():
        value = getattr(moe, name)
        if moe.router not in kinds and value != getattr(MoEConfig(), name):
            yield (
                f"moe.{name} {value} means nothing to moe.router {moe.router!r}: drop it, or use "
                f"router {' or '.join(kinds)}"
            )
    if moe.router == "expert_choice" and moe.gates != "softmax_topk":
        yield (
            f"moe.gates {moe.gates!r} with moe.router 'expert_choice': its gates are the softmax "
            "over all experts: set 'softmax_topk'"
        )
    if moe.router == "hash" and moe.gates == "softmax_topk":
        yield (
            "moe.gates 'softmax_topk' with moe.router 'hash': its gates are equal and sum to 1: "
            "set 'topk_softmax'"
        )
    if moe.router == "self_selecting" and moe.expert_in_map == "separate":
        yield (
            "moe.expert_in_map 'separate' with moe.router 'self_selecting': its keys are separate "
            "already: use a shared map or 'none'"
        )
    started = "expert_in_map" if moe.router == "self_selecting" else "router_map"
    if moe.router_init == "data" and getattr(moe, started) not in ("linear", "diagonal"):
        yield (
            f"moe.router_init 'data' sets moe.{started}, which is {getattr(moe, started)!r}: use "
            "'linear' or 'diagonal'"
        )
    if moe.balance == "quantile" and moe.top_k == moe.experts:
        yield (
            f"moe.balance 'quantile' with moe.top_k {moe.top_k} of moe.experts {moe.experts}: "
            "every expert is chosen: lower moe.top_k, or use moe.balance 'none'"
        )
    if moe.balance != "loss_free" and moe.bias_update_rate != MoEConfig().bias_update_rate:
        yield (
            f"moe.bias_update_rate {moe.bias_update_rate} with moe.balance {moe.balance!r}: drop "
            "it, or use moe.balance 'loss_free'"
        )


BELONGS_TO = {
    "transform": ("simvq",),
    "train_base": ("simvq",),
    "bias": ("simvq",),
    "base_width": ("simvq",),
    "groups": ("group_vq",),
    "levels": ("fsq",),
    "gradient": ("vq", "ema", "simvq", "cosine_vq", "group_vq", "mlp_vq"),
    "decay": ("ema",),
    "restart": ("vq", "ema", "cosine_vq"),
}
"""Kinds of quantizers that have the option; for others only its default is accepted."""
WHY_NOT = {"restart": ", whose codes have no free rows: under a map or on a grid none moves alone"}
"""Why an option means nothing to the others, where the name does not say."""
STARTS = {"data": ("simvq", "group_vq"), "kmeans": ("vq", "ema", "cosine_vq")}


def _quantizer_problems(q: QuantizerConfig) -> Iterator[str]:
    for name, kinds in BELONGS_TO.items():
        value = getattr(q, name)
        if q.kind not in kinds and value != getattr(QuantizerConfig(), name):
            yield (
                f"quantizer.{name} {value} means nothing to quantizer.kind {q.kind!r}"
                f"{WHY_NOT.get(name, '')}: drop it, or use kind {' or '.join(kinds)}"
            )
    if not q.restart < 1:
        yield (
            f"quantizer.restart {q.restart} is not below 1, the draws a step that a restarted code "
            "is given: use less, such as 0.1"
        )
    if not q.decay < 1:
        yield f"quantizer.decay {q.decay} is not below 1: use less, or the codes never move"
    if q.init != "default" and q.kind not in STARTS[q.init]:
        yield (
            f"quantizer.init {q.init!r} does not go with quantizer.kind {q.kind!r}: "
            f"drop it, or use kind {' or '.join(STARTS[q.init])}"
        )
    if q.kind == "fsq" and not q.levels:
        yield (
            "quantizer.levels () with quantizer.kind 'fsq': give values of each channel, such as "
            "--quantizer.levels 8 8 8 --quantizer.width 3 --quantizer.codes 512"
        )
    if q.kind == "fsq" and (len(q.levels), prod(q.levels)) != (q.width, q.codes):
        yield (
            f"quantizer.levels {q.levels} need quantizer.width {len(q.levels)} and "
            f"quantizer.codes {prod(q.levels)}, not {q.width} and {q.codes}"
        )
    if q.kind in ("lfq", "bsq") and q.codes != 2**q.width:
        yield (
            f"quantizer.codes {q.codes} must be 2^quantizer.width = {2**q.width} with "
            f"quantizer.kind {q.kind!r}: a channel is a bit"
        )
    if q.residual_levels > 1 and q.gradient == "diveq":
        yield (
            "quantizer.gradient 'diveq' knows no quantizer.residual_levels "
            f"{q.residual_levels}: use 'straight_through' or 'rotation'"
        )
    if q.kind == "group_vq" and (q.groups is None or q.codes % q.groups):
        yield (
            f"quantizer.groups {q.groups} must divide quantizer.codes {q.codes} with "
            "quantizer.kind 'group_vq': set it"
        )


OF_VQGAN = ("channel_multipliers", "attention")
OF_JUDGED_IMAGES = (
    *("adversarial_weighting", "adversarial_start", "generator_loss"),
    *("discriminator_hidden", "discriminator_layers"),
)
"""Options of the image tokenizer that mean nothing without a discriminator."""


def _image_problems(config: Config) -> Iterator[str]:
    image, data, default = config.image_tokenizer, config.data, ImageTokenizerConfig()
    if data.image_size % 2**image.downsamplings:
        yield (
            f"data.image_size {data.image_size} does not divide by "
            f"2^{image.downsamplings}: lower image_tokenizer.downsamplings"
        )
    if data.shorter_side and data.shorter_side < data.image_size:
        yield (
            f"data.shorter_side {data.shorter_side} < data.image_size {data.image_size}: images "
            "would be smaller than their crops: raise it, or use 0"
        )
    if data.held_out_source is not None and config.task != "image_tokenizer":
        yield (
            f"data.held_out_source {data.held_out_source!r} with task {config.task!r}: only "
            "'image_tokenizer' has it: drop it"
        )
    for name in OF_VQGAN:
        if image.architecture != "vqgan" and getattr(image, name) != getattr(default, name):
            yield (
                f"image_tokenizer.{name} {getattr(image, name)} means nothing to "
                f"image_tokenizer.architecture {image.architecture!r}: drop it, or use 'vqgan'"
            )
    if image.architecture == "vqgan" and not image.residual_blocks:
        yield (
            "image_tokenizer.residual_blocks 0 with image_tokenizer.architecture 'vqgan': use at "
            "least 1"
        )
    multipliers = image.channel_multipliers
    if multipliers and (len(multipliers) != image.downsamplings + 1 or min(multipliers) < 1):
        yield (
            f"image_tokenizer.channel_multipliers {multipliers} with image_tokenizer.downsamplings "
            f"{image.downsamplings}: give {image.downsamplings + 1}, each at least 1"
        )
    if image.lpips_file is not None and not image.lpips_weight:
        yield (
            f"image_tokenizer.lpips_file {image.lpips_file!r} means nothing with "
            "image_tokenizer.lpips_weight 0: drop it, or use a weight such as 1"
        )
    if image.lpips_weight and data.image_size < 16:
        yield (
            f"image_tokenizer.lpips_weight {image.lpips_weight} with data.image_size "
            f"{data.image_size}: LPIPS needs 16 pixels: raise it, or use weight 0"
        )
    yield from _judge_problems(config)


def _judge_problems(config: Config) -> Iterator[str]:
    image, default = config.image_tokenizer, ImageTokenizerConfig()
    if not image.adversarial_weight:
        for name in OF_JUDGED_IMAGES:
            if getattr(image, name) != getattr(default, name):
                yield (
                    f"image_tokenizer.{name} {getattr(image, name)} means nothing with "
                    "image_tokenizer.adversarial_weight 0: drop it, or use a weight such as 1"
                )
        return
    if image.adversarial_start >= config.train.steps:
        yield (
            f"image_tokenizer.adversarial_start {image.adversarial_start} >= train.steps "
            f"{config.train.steps}: the discriminator would never play: lower it"
        )
    if config.data.image_size >> image.discriminator_layers < 3:
        yield (
            f"image_tokenizer.discriminator_layers {image.discriminator_layers} with "
            f"data.image_size {config.data.image_size}: nothing is left to judge: use fewer"
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
            "data.sources, or drop one of them"
        )
    weights = data.source_weights
    if weights and (len(weights) != len(data.sources) or not min(weights) > 0):
        yield (
            f"data.source_weights {weights} with data.sources {data.sources}: give as many, each "
            "above 0"
        )
    if not 0 < data.held_out_share < 1:
        yield f"data.held_out_share {data.held_out_share}: use more than 0 and less than 1"


OF_DISCRIMINATORS = (
    *("feature_weight", "adversarial_start", "discriminator_hidden"),
    *("discriminator_periods", "discriminator_windows"),
)
"""Options of the audio tokenizer that mean nothing without discriminators."""


def _audio_problems(config: Config) -> Iterator[str]:
    audio, data = config.audio_tokenizer, config.data
    for name, least in (
        *(("strides", 2), ("dilations", 1), ("loss_windows", 32)),
        *(("discriminator_periods", 2), ("discriminator_windows", 32)),
    ):
        values = getattr(audio, name)
        if not values or min(values) < least:
            yield f"audio_tokenizer.{name} {values}: give one or more, each at least {least}"
        elif name.endswith("windows") and any(value % 32 for value in values):
            yield f"audio_tokenizer.{name} {values}: use multiples of 32"
    if not audio.adversarial_weight:
        for name in OF_DISCRIMINATORS:
            value = getattr(audio, name)
            if value != getattr(AudioTokenizerConfig(), name):
                yield (
                    f"audio_tokenizer.{name} {value} means nothing with "
                    "audio_tokenizer.adversarial_weight 0: drop it, or use a weight such as 1"
                )
    elif audio.adversarial_start >= config.train.steps:
        yield (
            f"audio_tokenizer.adversarial_start {audio.adversarial_start} >= train.steps "
            f"{config.train.steps}: the discriminators would never play: lower it"
        )
    if not data.audio_seconds * data.sample_rate >= 1:
        yield (
            f"data.audio_seconds {data.audio_seconds} at data.sample_rate {data.sample_rate} is "
            "less than a sample: raise it"
        )


def _below_minimum(config: Config) -> Iterator[str]:
    source = config.data.source
    minimum = {
        "quantizer.codes": 2,
        "quantizer.width": 1,
        "quantizer.residual_levels": 1,
        "quantizer.restart": 0,
        "quantizer.decay": 0,
        "moe.experts": 1,
        "moe.top_k": 1,
        "moe.hidden": 1,
        "moe.shared_experts": 0,
        "moe.capacity_factor": 0,
        "moe.map_rank": 1,
        "moe.self_selecting_rank": 1,
        "moe.router_codebook_weight": 0,
        "moe.router_commitment_weight": 0,
        "moe.bias_update_rate": 0,
        "moe.expert_parallel": 1,
        "moe.z_loss_weight": 0,
        "moe.balance_weight": 0,
        "language_model.layers": 1,
        "language_model.heads": 1,
        "language_model.width": 2,
        "language_model.moe_every": 0,
        "image_tokenizer.hidden": 1,
        "image_tokenizer.downsamplings": 0,
        "image_tokenizer.residual_blocks": 0,
        "image_tokenizer.mse_weight": 0,
        "image_tokenizer.l1_weight": 0,
        "image_tokenizer.ssim_weight": 0,
        "image_tokenizer.lpips_weight": 0,
        "image_tokenizer.adversarial_weight": 0,
        "image_tokenizer.adversarial_start": 0,
        "image_tokenizer.discriminator_hidden": 1,
        "image_tokenizer.discriminator_layers": 1,
        "data.shorter_side": 0,
        "data.decoded_megabytes": 0,
        "audio_tokenizer.hidden": 1,
        "audio_tokenizer.waveform_weight": 0,
        "audio_tokenizer.spectral_weight": 0,
        "audio_tokenizer.mel_weight": 0,
        "audio_tokenizer.adversarial_weight": 0,
        "audio_tokenizer.feature_weight": 0,
        "audio_tokenizer.adversarial_start": 0,
        "audio_tokenizer.discriminator_hidden": 1,
        "data.sample_rate": 1,
        "data.audio_seconds": 0,
        "data.image_size": 1,
        "data.crops": 1,
        "data.held_out_crops": 1,
        "data.context": 1,
        "data.vocabulary": 2 if source is not None and is_codes(source) else 257,
        "data.held_out_documents": 1,
        "data.shuffle_buffer": 1,
        "data.prefetch": 0,
        "train.steps": 1,
        "train.batch_size": 1,
        "train.accumulation": 1,
        "train.clip": 0,
        "train.log_every": 1,
        "train.eval_every": 1,
        "train.eval_batch_size": 1,
        "train.probe_tokens": 0,
        "train.save_every": 1,
        "train.keep_checkpoints": 1,
        "train.keep_every": 0,
        "train.timeout_s": 0,
        "optimizer.lr": 0,
        "optimizer.warmup_steps": 0,
        "optimizer.map_lr_multiplier": 0,
        "optimizer.router_lr_multiplier": 0,
        "seed": 0,
        "data.seed": 0,
    }
    flat = flatten(config)
    for key, least in minimum.items():
        if not flat[key] >= least:
            yield f"{key} {flat[key]} < {least}: use at least {least}"
