"""What each value of a config may be by itself; see `config_checks`.

Upper bounds are far beyond what anyone trains. They keep products of sizes within 64 bits, and a
slip of the keyboard from filling the memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isfinite, nextafter
from typing import Any

from simvq_moe.config.conversion import shown
from simvq_moe.config.loading import flatten
from simvq_moe.config.schema import Config
from simvq_moe.data.codes import is_codes

COUNT = 2**31 - 1
"""Of samples, steps and the like."""
CHANNELS = 2**18
SEED = 2**63 - 1
"""The largest seed that every generator takes."""
FACTOR = 1e6
"""Of weights and multipliers."""
BELOW_1 = nextafter(1, 0)
LIST = 64
"""Values of a list at most."""

RANGES: dict[str, tuple[int | float, int | float]] = {
    "seed": (0, SEED),
    "data.seed": (0, SEED),
    "data.image_size": (1, 2**14),
    "data.shorter_side": (0, 2**16),
    "data.decoded_megabytes": (0, COUNT),
    "data.crops": (1, COUNT),
    "data.held_out_crops": (1, COUNT),
    "data.sample_rate": (1, 10**6),
    "data.audio_seconds": (0, 3600),
    "data.vocabulary": (257, 2**24),
    "data.context": (1, 2**24),
    "data.source_weights": (0, FACTOR),
    "data.held_out_share": (0, 1),
    "data.held_out_documents": (1, COUNT),
    "data.shuffle_buffer": (1, COUNT),
    "data.prefetch": (0, 1000),
    "quantizer.codes": (2, COUNT),
    "quantizer.width": (1, CHANNELS),
    "quantizer.residual_levels": (1, 256),
    "quantizer.base_width": (1, CHANNELS),
    "quantizer.groups": (1, 2**12),
    "quantizer.levels": (2, 2**16),
    "quantizer.codebook_weight": (0, FACTOR),
    "quantizer.commitment_weight": (0, FACTOR),
    "quantizer.entropy_weight": (0, FACTOR),
    "quantizer.decay": (0, 1),
    "quantizer.restart": (0, 1),
    "image_tokenizer.hidden": (1, 2**14),
    "image_tokenizer.downsamplings": (0, 14),
    "image_tokenizer.residual_blocks": (0, 100),
    "image_tokenizer.channel_multipliers": (0, 2**10),
    "image_tokenizer.mse_weight": (0, FACTOR),
    "image_tokenizer.l1_weight": (0, FACTOR),
    "image_tokenizer.ssim_weight": (0, FACTOR),
    "image_tokenizer.lpips_weight": (0, FACTOR),
    "image_tokenizer.adversarial_weight": (0, FACTOR),
    "image_tokenizer.adversarial_start": (0, COUNT),
    "image_tokenizer.discriminator_hidden": (1, 2**12),
    "image_tokenizer.discriminator_layers": (1, 12),
    "audio_tokenizer.hidden": (1, 2**12),
    "audio_tokenizer.strides": (2, 2**10),
    "audio_tokenizer.dilations": (1, 2**12),
    "audio_tokenizer.loss_windows": (32, 2**20),
    "audio_tokenizer.waveform_weight": (0, FACTOR),
    "audio_tokenizer.spectral_weight": (0, FACTOR),
    "audio_tokenizer.mel_weight": (0, FACTOR),
    "audio_tokenizer.mel_bands": (1, 2**12),
    "audio_tokenizer.mel_floor": (1e-20, 1),
    "audio_tokenizer.adversarial_weight": (0, FACTOR),
    "audio_tokenizer.feature_weight": (0, FACTOR),
    "audio_tokenizer.adversarial_start": (0, COUNT),
    "audio_tokenizer.discriminator_hidden": (1, 2**12),
    "audio_tokenizer.discriminator_periods": (2, 2**12),
    "audio_tokenizer.discriminator_windows": (32, 2**20),
    "audio_tokenizer.discriminator_bands": (0, 1),
    "moe.experts": (1, CHANNELS),
    "moe.top_k": (1, CHANNELS),
    "moe.hidden": (1, CHANNELS),
    "moe.shared_experts": (0, 2**10),
    "moe.capacity_factor": (0, FACTOR),
    "moe.router_base_width": (1, CHANNELS),
    "moe.router_projection": (1, CHANNELS),
    "moe.router_codebook_weight": (0, FACTOR),
    "moe.router_commitment_weight": (0, FACTOR),
    "moe.self_selecting_rank": (1, 2**12),
    "moe.whitening_exponent": (-2, 2),
    "moe.whitening_decay": (0, BELOW_1),
    "moe.whitening_floor": (1e-9, 1),
    "moe.whitening_every": (1, COUNT),
    "moe.whitening_rank": (1, CHANNELS),
    "moe.map_rank": (1, 2**12),
    "moe.expert_parallel": (1, CHANNELS),
    "moe.balance_weight": (0, FACTOR),
    "moe.bias_update_rate": (0, FACTOR),
    "moe.z_loss_weight": (0, FACTOR),
    "language_model.width": (2, CHANNELS),
    "language_model.layers": (1, 1000),
    "language_model.heads": (1, CHANNELS),
    "language_model.moe_every": (0, 1000),
    "optimizer.lr": (0, 1e38),  # of float32; a rate that diverges is a result
    "optimizer.betas": (0, BELOW_1),
    "optimizer.weight_decay": (0, FACTOR),
    "optimizer.warmup_steps": (0, COUNT),
    "optimizer.final_lr_ratio": (0, FACTOR),
    "optimizer.map_lr_multiplier": (0, FACTOR),
    "optimizer.router_lr_multiplier": (0, FACTOR),
    "train.steps": (1, COUNT),
    "train.batch_size": (1, COUNT),
    "train.accumulation": (1, COUNT),
    "train.clip": (0, FACTOR),
    "train.peak_flops": (0, 1e18),
    "train.log_every": (1, COUNT),
    "train.eval_every": (1, COUNT),
    "train.eval_batch_size": (1, COUNT),
    "train.probe_tokens": (0, 2**24),
    "train.save_every": (1, COUNT),
    "train.keep_checkpoints": (1, COUNT),
    "train.keep_every": (0, COUNT),
    "train.timeout_s": (0, 10**7),
}
"""Least and largest of every number, also of those in a list; a vocabulary of codes may be smaller.
"""

RESERVED = ("report", "checkpoints", "tensorboard", "samples", "profile")
"""Folders that stand beside runs, or within one."""
PART_BYTES, NAME_BYTES = 200, 1000
"""Of a part of a name, and of a name: file systems end at 255 and 4,096."""


def value_problems(config: Config) -> Iterator[str]:
    """Values that are out of range, not finite, empty or unprintable, and names of no folder."""
    source = config.data.source
    codes = source is not None and is_codes(source)
    least_of = {"data.vocabulary": 2} if codes else {}
    for key, value in flatten(config).items():
        values = value if isinstance(value, tuple) else (value,)
        if len(values) > LIST:
            yield f"{key} has {len(values)} values: give at most {LIST}"
        for one in values:
            if isinstance(one, str):
                yield from _text_problems(key, one)
            elif key in RANGES and one is not None:
                least, most = RANGES[key]
                yield from _number_problems(key, value, one, least_of.get(key, least), most)
    yield from name_problems("name", config.name)


def _number_problems(
    key: str, value: Any, one: int | float, least: int | float, most: int | float
) -> Iterator[str]:
    if not one >= least:
        yield f"{key} {shown(value)} < {least:g}: use at least {least:g}"
    if one > most or not isfinite(one):  # in this order: isfinite takes no huge integer
        yield f"{key} {shown(value)} > {most:,}: use at most that"


def _text_problems(key: str, text: str) -> Iterator[str]:
    if not text.strip():
        yield f"{key} {text!r} is empty: give a value, or leave it out"
    if not text.isprintable():
        yield f"{key} {shown(text)} has characters that can't be printed: leave them out"


def name_problems(key: str, name: str, *, parts: int | None = None) -> Iterator[str]:
    """What keeps a name from being a folder of its own below the folder of all runs.

    Args:
        parts: folders within each other at most; None: any number.
    """
    found = name.split("/")
    if not all(re.fullmatch(r"\w[\w.+=-]*", part) for part in found) or not name.isprintable():
        yield (
            f"{key} {shown(name)}: use letters, digits and . _ + = -, a letter, digit or _ first"
            + ("" if parts == 1 else ", with / between folders")
        )
    elif len(found) > (parts or len(found)):
        yield f"{key} {shown(name)} is a folder within another: leave out the /"
    elif max(len(part.encode()) for part in found) > PART_BYTES or len(name.encode()) > NAME_BYTES:
        yield (
            f"{key} {shown(name)} is too long: use at most {PART_BYTES} bytes for a folder, and "
            f"{NAME_BYTES:,} in all"
        )
    elif reserved := [part for part in found if part.lower() in RESERVED]:
        yield f"{key} {shown(name)}: {reserved[0]!r} is a folder of records: use another word"
