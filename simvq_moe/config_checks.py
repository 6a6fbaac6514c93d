"""What can't run, or not together, found before anything is written.

Each problem is a `ConfigError`: one line that names the key, the value and the way out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from math import prod

from simvq_moe.config import AudioTokenizerConfig, Config, MoEConfig, QuantizerConfig
from simvq_moe.merging import ConfigError, flatten


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
    for name in ("activation_checkpointing", "compile"):
        if getattr(config.train, name) and config.task != "language_model":
            yield f"train.{name} True with task {config.task!r}: only 'language_model' has it"
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
    if config.data.image_size % 2**config.image_tokenizer.downsamplings:
        yield (
            f"data.image_size {config.data.image_size} does not divide by "
            f"2^{config.image_tokenizer.downsamplings}: lower image_tokenizer.downsamplings"
        )
    yield from _audio_problems(config)
    if not re.fullmatch(r"[\w.+=-]+(/[\w.+=-]+)*", config.name) or ".." in config.name.split("/"):
        yield f"name {config.name!r}: use letters, digits and . _ + = -, with / between folders"


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
        "data.vocabulary": 257,
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
