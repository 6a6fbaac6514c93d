"""Models from the config; the same seed gives arms the same weights where their shapes allow."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from simvq_moe.config.schema import Config, QuantizerConfig
from simvq_moe.core.streams import own_stream
from simvq_moe.models.audio_discriminators import Discriminators
from simvq_moe.models.audio_spectra import MelDistance
from simvq_moe.models.audio_tokenizer import AudioTokenizer
from simvq_moe.models.image_discriminator import PatchDiscriminator
from simvq_moe.models.image_losses import LPIPS, vgg_file
from simvq_moe.models.image_tokenizer import ImageTokenizer
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.quantizers import (
    BSQ,
    EMAVQ,
    FSQ,
    IBQ,
    LFQ,
    MLPVQ,
    VQ,
    AnyQuantizer,
    CosineVQ,
    GroupVQ,
    ResidualQuantizer,
    SimVQ,
)

AnyModel = ImageTokenizer | AudioTokenizer | LanguageModel


def build_model(config: Config) -> AnyModel:
    """The model of the config's task, started from its seed."""
    torch.manual_seed(config.seed)
    if config.task != "language_model":
        with own_stream():
            quantizer = build_quantizer(config.quantizer)
        if config.task == "audio_tokenizer":
            return _audio_tokenizer(config, quantizer)
        return _image_tokenizer(config, quantizer)
    moe = asdict(config.moe)
    names = ("balance", "z_loss", "router_codebook", "router_commitment")
    weights = {name.removesuffix("_loss"): moe.pop(f"{name}_weight") for name in names}
    if config.moe.balance != "aux":
        weights["balance"] = 0.0
    return LanguageModel(
        config.data.vocabulary,
        config.data.context,
        **asdict(config.language_model),
        activation_checkpointing=config.train.activation_checkpointing,
        document_mask=config.data.document_mask,
        loss_weights=weights,
        moe=moe | {"vocabulary": config.data.vocabulary},
    )


def _image_tokenizer(config: Config, quantizer: AnyQuantizer) -> ImageTokenizer:
    image, lpips, discriminator = config.image_tokenizer, None, None
    file = vgg_file(image.lpips_file)
    if image.lpips_weight and file.is_file():  # it is missed in training alone, see `check_source`
        lpips = LPIPS.load(file)
    if image.adversarial_weight:
        with own_stream():
            discriminator = PatchDiscriminator(
                image.discriminator_hidden, image.discriminator_layers, image.generator_loss
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


def _audio_tokenizer(config: Config, quantizer: AnyQuantizer) -> AudioTokenizer:
    audio, discriminators = config.audio_tokenizer, None
    names = ("waveform", "spectral", "mel", "adversarial", "feature")
    if audio.adversarial_weight:
        with own_stream():
            discriminators = Discriminators(
                audio.discriminator_periods,
                audio.discriminator_windows,
                audio.discriminator_hidden,
                audio.discriminator_bands,
            )
    mel = MelDistance(
        config.data.sample_rate,
        audio.loss_windows,
        bands=audio.mel_bands,
        scale=audio.mel_scale,
        floor=audio.mel_floor,
        units=audio.mel_units,
    )
    return AudioTokenizer(
        quantizer,
        sample_rate=config.data.sample_rate,
        loss_windows=audio.loss_windows,
        loss_weights={name: getattr(audio, f"{name}_weight") for name in names},
        hidden=audio.hidden,
        strides=audio.strides,
        dilations=audio.dilations,
        discriminators=discriminators,
        # a step is as many forward passes
        adversarial_start=audio.adversarial_start * config.train.accumulation,
        mel=mel,
    )


def build_quantizer(config: QuantizerConfig) -> AnyQuantizer:
    """The quantizer, or as many of them in a row as it has residual levels."""
    if config.residual_levels == 1:
        return _one_level(config)
    levels = [_one_level(config) for _ in range(config.residual_levels)]
    assert config.gradient != "diveq"
    return ResidualQuantizer(levels, gradient=config.gradient)


def _one_level(q: QuantizerConfig) -> AnyQuantizer:
    own = {name: getattr(q, name) for name in ("codebook_weight", "commitment_weight")}
    # what is None is the class's own
    both: dict[str, Any] = {name: weight for name, weight in own.items() if weight is not None}
    commitment = {k: w for k, w in both.items() if k == "commitment_weight"}
    entropy: dict[str, Any] = {}
    if q.entropy_weight is not None:
        entropy["entropy_weight"] = q.entropy_weight
    gradient: dict[str, Any] = {"gradient": q.gradient}
    from_data: dict[str, Any] = {} if q.init == "default" else {"init": q.init}
    if q.kind == "simvq":
        shape = {"transform": q.transform, "base_width": q.base_width}
        learned = {"train_base": q.train_base, "bias": q.bias}
        return SimVQ(q.codes, q.width, **shape, **learned, **both, **gradient, **from_data)
    if q.kind == "ema":
        averages = {"decay": q.decay, "restart": q.restart}
        return EMAVQ(q.codes, q.width, **averages, **commitment, **gradient, **from_data)
    if q.kind == "fsq":
        return FSQ(q.levels)
    if q.kind in ("lfq", "bsq"):
        family = LFQ if q.kind == "lfq" else BSQ
        return family(q.width, **commitment, **entropy)
    if q.kind == "group_vq":
        assert q.groups is not None
        return GroupVQ(q.codes, q.width, groups=q.groups, **both, **gradient, **from_data)
    if q.kind == "mlp_vq":
        return MLPVQ(q.codes, q.width, **both, **gradient)
    if q.kind == "ibq":
        return IBQ(q.codes, q.width, **both, **entropy)
    family = CosineVQ if q.kind == "cosine_vq" else VQ
    return family(q.codes, q.width, restart=q.restart, **both, **gradient, **from_data)
