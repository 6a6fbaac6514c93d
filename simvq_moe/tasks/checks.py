"""Options of our tasks that can't run, or not together: the key, the value and the way out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from simvq_moe.config.schema import (
    AudioTokenizerConfig,
    Config,
    DataConfig,
    ImageTokenizerConfig,
)
from simvq_moe.data.codes import is_codes

OF_VQGAN = ("channel_multipliers", "attention")
OF_JUDGED_IMAGES = (
    *("adversarial_weighting", "adversarial_start", "generator_loss"),
    *("discriminator_hidden", "discriminator_layers", "lecam_weight"),
)
"""Options of the image tokenizer that mean nothing without a discriminator."""


def image_problems(config: Config) -> Iterator[str]:
    """Options of the image tokenizer and its data that mean nothing, or do not go together."""
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


OF_DISCRIMINATORS = (
    *("feature_weight", "adversarial_start", "discriminator_hidden"),
    *("discriminator_periods", "discriminator_windows", "discriminator_bands"),
)
"""Options of the audio tokenizer that mean nothing without discriminators."""


def audio_problems(config: Config) -> Iterator[str]:
    """Options of the audio tokenizer and its data that mean nothing, or do not go together."""
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
    if audio.mel_bands and len(audio.mel_bands) != len(audio.loss_windows):
        yield (
            f"audio_tokenizer.mel_bands {audio.mel_bands} with audio_tokenizer.loss_windows "
            f"{audio.loss_windows}: give {len(audio.loss_windows)}, one for each, or none"
        )
    bins = min(audio.discriminator_windows, default=0) // 2 + 1
    edges = [0, *(int(border * bins) for border in audio.discriminator_bands), bins]
    if any(a >= b for a, b in pairwise(edges)):
        yield (
            f"audio_tokenizer.discriminator_bands {audio.discriminator_bands} leave a band without "
            f"one of the {bins} frequencies of the smallest of audio_tokenizer."
            "discriminator_windows: give fewer, in rising order"
        )
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


OF_STREAMS = (
    *("sources", "source_weights", "held_out_share", "held_out_documents", "shuffle_buffer"),
)
"""Options of the data that mean nothing without data.streaming."""
LEAST_OF_TEXT = 257
"""Least vocabulary of text: the bytes and the end of text; of codes it may be smaller."""


def language_problems(config: Config) -> Iterator[str]:
    """Options of the language model and its data that mean nothing, or do not go together."""
    lm, data, default = config.language_model, config.data, DataConfig()
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
    if data.vocabulary < LEAST_OF_TEXT and not (data.source is not None and is_codes(data.source)):
        yield f"data.vocabulary {data.vocabulary} < {LEAST_OF_TEXT}: use at least {LEAST_OF_TEXT}"
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
    if data.held_out_source is not None and data.streaming:
        yield (
            f"data.held_out_source {data.held_out_source!r} with data.streaming True: held-out "
            "documents of streams are a part of them, data.held_out_share: drop one of them"
        )
    if data.source is not None and is_codes(data.source) and data.held_out_source is not None:
        yield (
            f"data.held_out_source {data.held_out_source!r} with data.source {data.source!r}: "
            "codes have a held-out part of their own: drop it"
        )
    weights = data.source_weights
    if weights and (len(weights) != len(data.sources) or not min(weights) > 0):
        yield (
            f"data.source_weights {weights} with data.sources {data.sources}: give as many, each "
            "above 0"
        )
    if not 0 < data.held_out_share < 1:
        yield f"data.held_out_share {data.held_out_share}: use more than 0 and less than 1"
