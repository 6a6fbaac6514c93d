"""Audio tokenizers: clips, reconstruction, and what recordings are as files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from simvq_moe.config.schema import Config
from simvq_moe.core.streams import own_stream
from simvq_moe.data import audio
from simvq_moe.data.audio import RecordingWindows, recording_windows
from simvq_moe.data.code_items import Item
from simvq_moe.data.hashing import digest_of_both
from simvq_moe.models.audio.discriminators import Discriminators
from simvq_moe.models.audio.spectra import MelDistance
from simvq_moe.models.audio.tokenizer import AudioTokenizer
from simvq_moe.tasks.audio_measures import AudioMeasures
from simvq_moe.tasks.base import CountedSample
from simvq_moe.tasks.checks import meaningless
from simvq_moe.tasks.registry import register
from simvq_moe.tasks.samples import Samples
from simvq_moe.tasks.tokenizers import Parts, TokenizerTask, check_not_empty

OF_DISCRIMINATORS = (
    *("feature_weight", "adversarial_start", "discriminator_hidden"),
    *("discriminator_periods", "discriminator_windows", "discriminator_bands"),
)
"""Options of the audio tokenizer that mean nothing without discriminators."""


@register
class AudioTokenizerTask(TokenizerTask[AudioTokenizer]):
    """Clips of recordings, in codes and back."""

    name = "audio_tokenizer"
    embedded = "spoken-characters"
    sections = ("quantizer", "audio_tokenizer")
    depths = ("quantizer.residual_levels",)
    own_options = ("data.held_out_source",)
    loss_measure = "val/mel_distance"
    suffix = "wav"

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        return _problems(config)

    @classmethod
    def check_files(cls, config: Config) -> None:
        audio.check_source(cls.source(config))
        if config.data.held_out_source is not None:
            audio.check_source(config.data.held_out_source)

    @classmethod
    def _model(cls, config: Config) -> AudioTokenizer:
        with own_stream():
            quantizer = config.quantizer.build()
        settings, discriminators = config.audio_tokenizer, None
        names = ("waveform", "spectral", "mel", "adversarial", "feature")
        if settings.adversarial_weight:
            with own_stream():
                discriminators = Discriminators(
                    settings.discriminator_periods,
                    settings.discriminator_windows,
                    settings.discriminator_hidden,
                    settings.discriminator_bands,
                )
        mel = MelDistance(
            config.data.sample_rate,
            settings.loss_windows,
            bands=settings.mel_bands,
            scale=settings.mel_scale,
            floor=settings.mel_floor,
            units=settings.mel_units,
        )
        return AudioTokenizer(
            quantizer,
            sample_rate=config.data.sample_rate,
            loss_windows=settings.loss_windows,
            loss_weights={name: getattr(settings, f"{name}_weight") for name in names},
            hidden=settings.hidden,
            strides=settings.strides,
            dilations=settings.dilations,
            discriminators=discriminators,
            # a step is as many forward passes
            adversarial_start=settings.adversarial_start * config.train.accumulation,
            mel=mel,
        )

    @classmethod
    def counted_sample(cls, config: Config) -> CountedSample:
        settings, length = config.audio_tokenizer, _length(config)
        numbers = length * settings.hidden * 4 * (len(settings.dilations) + 1)
        return CountedSample((length,), numbers)

    @classmethod
    def tokens_of_a_sample(cls, config: Config) -> int:
        return -(-_length(config) // prod(config.audio_tokenizer.strides))

    @classmethod
    def own_measures(cls, config: Config) -> AudioMeasures:
        return AudioMeasures(config.data.sample_rate)

    @classmethod
    def crops(cls, config: Config) -> Parts:
        data = config.data
        train, held_out = audio.audio_clips(
            cls.source(config),
            sample_rate=data.sample_rate,
            length=_length(config),
            clips=data.crops,
            held_out_clips=data.held_out_crops,
            seed=data.seed,
            held_out_source=data.held_out_source,
            memory=data.decoded_megabytes * 2**20,
        )
        return Parts(train, held_out, digest_of_both(train.digest(), held_out.digest()))

    @classmethod
    def windows(cls, config: Config) -> Parts:
        train, held_out = recording_windows(
            cls.source(config),
            sample_rate=config.data.sample_rate,
            length=_length(config),
            held_out_source=config.data.held_out_source,
        )
        check_not_empty(cls.source(config), train, held_out)
        digest = train.digest() + held_out.digest()
        return Parts(train, held_out, digest, (_items(train), _items(held_out)))

    @classmethod
    def sample_rate(cls, config: Config) -> int:
        return config.data.sample_rate

    @classmethod
    def empty(cls, sides: Sequence[int]) -> np.ndarray:
        return np.zeros(sides, np.float32)

    @classmethod
    def values(cls, samples: Tensor) -> np.ndarray:
        return samples.clamp(-1, 1).cpu().numpy()

    @classmethod
    def _write(cls, values: np.ndarray, file: Path, sample_rate: int) -> None:
        soundfile.write(file, values, sample_rate)

    @classmethod
    def shown(cls, samples: Mapping[str, Tensor], *, sample_rate: int) -> Samples:
        sounds = {name: cls.values(clips) for name, clips in samples.items()}
        return Samples(sounds=sounds, sample_rate=sample_rate)

    @classmethod
    def _noise(cls, model: AudioTokenizer, config: Config) -> Tensor:
        del config
        return torch.rand(8, 16 * model.hop) * 2 - 1


def _length(config: Config) -> int:
    """Values of a clip."""
    return round(config.data.audio_seconds * config.data.sample_rate)


def _items(windows: RecordingWindows) -> list[Item]:
    totals = np.bincount(windows.recording_of, windows.lengths, len(windows.names)).astype(int)
    return [
        Item(name, (total,)) for name, total in zip(windows.names, totals.tolist(), strict=True)
    ]


def _problems(config: Config) -> Iterator[str]:
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
        without = "with audio_tokenizer.adversarial_weight 0: drop it, or use a weight such as 1"
        yield from meaningless("audio_tokenizer", audio, OF_DISCRIMINATORS, without)
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
