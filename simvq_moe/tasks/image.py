"""Image tokenizers: crops, reconstruction, and what images are as files and sheets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from simvq_moe.config.schema import Config
from simvq_moe.core.streams import own_stream
from simvq_moe.data import images
from simvq_moe.data.code_items import Item
from simvq_moe.data.hashing import digest_of_both
from simvq_moe.data.media.image_windows import ImageWindows, image_windows
from simvq_moe.errors import ConfigError
from simvq_moe.models.image.discriminator import PatchDiscriminator
from simvq_moe.models.image.losses import LPIPS, vgg_file
from simvq_moe.models.image.tokenizer import ImageTokenizer
from simvq_moe.tasks.base import CountedSample
from simvq_moe.tasks.checks import meaningless
from simvq_moe.tasks.image_measures import (
    ImageMeasures,
    as_bytes,
    missing_vgg,
    optional_measures,
)
from simvq_moe.tasks.registry import register
from simvq_moe.tasks.samples import Samples
from simvq_moe.tasks.tokenizers import Parts, TokenizerTask, check_not_empty

OF_VQGAN = ("channel_multipliers", "attention")
OF_JUDGED_IMAGES = (
    *("adversarial_weighting", "adversarial_start", "generator_loss"),
    *("discriminator_hidden", "discriminator_layers", "lecam_weight"),
)
"""Options of the image tokenizer that mean nothing without a discriminator."""


@register
class ImageTokenizerTask(TokenizerTask[ImageTokenizer]):
    """Square crops of images, in codes and back."""

    name = "image_tokenizer"
    embedded = "photos"
    sections = ("quantizer", "image_tokenizer")
    depths = (
        *("quantizer.residual_levels", "image_tokenizer.residual_blocks"),
        *("image_tokenizer.downsamplings", "image_tokenizer.discriminator_layers"),
    )
    own_options = ("data.held_out_source",)
    loss_measure = "val/mse"
    suffix = "png"

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        return _problems(config)

    @classmethod
    def check_files(cls, config: Config) -> None:
        images.check_source(cls.source(config), config.data.held_out_source)
        if cls.lacks_networks(config):
            image = config.image_tokenizer
            raise ConfigError(
                f"image_tokenizer.lpips_weight {image.lpips_weight}: {missing_vgg(image)}, name "
                "another file by image_tokenizer.lpips_file, or use weight 0"
            )

    @classmethod
    def lacks_networks(cls, config: Config) -> bool:
        image = config.image_tokenizer
        return bool(image.lpips_weight) and not vgg_file(image.lpips_file).is_file()

    @classmethod
    def without_networks(cls, config: Config) -> Config:
        image = replace(config.image_tokenizer, lpips_weight=0.0, lpips_file=None)
        return replace(config, image_tokenizer=image)

    @classmethod
    def _model(cls, config: Config) -> ImageTokenizer:
        with own_stream():
            quantizer = config.quantizer.build()
        image, lpips, discriminator = config.image_tokenizer, None, None
        file = vgg_file(image.lpips_file)
        if image.lpips_weight and file.is_file():  # training alone misses it, see `check_files`
            lpips = LPIPS.load(file)
        if image.adversarial_weight:
            with own_stream():
                discriminator = PatchDiscriminator(
                    hidden=image.discriminator_hidden,
                    layers=image.discriminator_layers,
                    generator_loss=image.generator_loss,
                    lecam=image.lecam_weight,
                )
        shape = ("architecture", "hidden", "downsamplings", "residual_blocks")
        names = ("mse", "l1", "ssim", "lpips", "adversarial")
        return ImageTokenizer(
            quantizer,
            **{name: getattr(image, name) for name in (*shape, "channel_multipliers", "attention")},
            loss_weights={name: getattr(image, f"{name}_weight") for name in names},
            lpips=lpips,
            discriminator=discriminator,
            adaptive=image.adversarial_weighting == "adaptive",
            # a step is as many forward passes
            adversarial_start=image.adversarial_start * config.train.accumulation,
        )

    @classmethod
    def counted_sample(cls, config: Config) -> CountedSample:
        image, side = config.image_tokenizer, config.data.image_size
        depth = 2 * (image.residual_blocks + 2) * max(image.channel_multipliers, default=1)
        return CountedSample((3, side, side), side**2 * image.hidden * depth)

    @classmethod
    def tokens_of_a_sample(cls, config: Config) -> int:
        return (config.data.image_size // 2**config.image_tokenizer.downsamplings) ** 2

    @classmethod
    def own_measures(cls, config: Config) -> ImageMeasures:
        del config
        return ImageMeasures()

    @classmethod
    def of_run(
        cls, config: Config, *, run_dir: Path, measures: Sequence[str] = ()
    ) -> ImageTokenizerTask:
        del run_dir
        return cls(config, measures=optional_measures(config.image_tokenizer, measures))

    @classmethod
    def crops(cls, config: Config) -> Parts:
        data = config.data
        train, held_out = images.image_crops(
            cls.source(config),
            size=data.image_size,
            crops=data.crops,
            held_out_crops=data.held_out_crops,
            seed=data.seed,
            held_out_source=data.held_out_source,
            shorter_side=data.shorter_side,
            memory=data.decoded_megabytes * 2**20,
        )
        return Parts(train, held_out, digest_of_both(train.digest(), held_out.digest()))

    @classmethod
    def windows(cls, config: Config) -> Parts:
        data = config.data
        train, held_out = image_windows(
            cls.source(config),
            size=data.image_size,
            held_out_source=data.held_out_source,
            shorter_side=data.shorter_side,
        )
        check_not_empty(cls.source(config), train, held_out)
        digest = train.digest() + held_out.digest()
        return Parts(train, held_out, digest, (_items(train), _items(held_out)))

    @classmethod
    def empty(cls, sides: Sequence[int]) -> np.ndarray:
        return np.zeros((*sides, 3), np.uint8)

    @classmethod
    def values(cls, samples: Tensor) -> np.ndarray:
        return pixels(samples)

    @classmethod
    def _write(cls, values: np.ndarray, file: Path, sample_rate: int) -> None:
        del sample_rate
        Image.fromarray(values).save(file)

    @classmethod
    def shown(cls, samples: Mapping[str, Tensor], *, sample_rate: int) -> Samples:
        del sample_rate
        return Samples(picture=sheet(*samples.values()))

    @classmethod
    def _noise(cls, model: ImageTokenizer, config: Config) -> Tensor:
        del model
        return torch.rand(8, 3, config.data.image_size, config.data.image_size) * 2 - 1


def _items(windows: ImageWindows) -> list[Item]:
    sizes = windows.sizes.tolist()
    return [Item(name, tuple(size)) for name, size in zip(windows.names, sizes, strict=True)]


def pixels(
    images: Float[Tensor, "batch 3 height width"],
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Bytes of images in [-1, 1]."""
    return as_bytes(images).movedim(1, -1).cpu().numpy()


def sheet(
    *rows: Float[Tensor, "batch 3 height width"],
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """Images side by side, one row under the other."""
    return np.concatenate([np.concatenate(list(pixels(row)), axis=1) for row in rows])


def _problems(config: Config) -> Iterator[str]:
    """Options of the image tokenizer and its data that mean nothing, or do not go together."""
    image, data = config.image_tokenizer, config.data
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
    if image.architecture != "vqgan":
        other = f"to image_tokenizer.architecture {image.architecture!r}: drop it, or use 'vqgan'"
        yield from meaningless("image_tokenizer", image, OF_VQGAN, other)
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
    image = config.image_tokenizer
    if not image.adversarial_weight:
        without = "with image_tokenizer.adversarial_weight 0: drop it, or use a weight such as 1"
        yield from meaningless("image_tokenizer", image, OF_JUDGED_IMAGES, without)
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
