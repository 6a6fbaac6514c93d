"""Models from the config; the same seed gives arms the same weights where their shapes allow."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from simvq_moe.config import Config, QuantizerConfig
from simvq_moe.core.streams import own_stream
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


def build_model(config: Config) -> ImageTokenizer | LanguageModel:
    """The model of the config's task, started from its seed."""
    torch.manual_seed(config.seed)
    if config.task == "image_tokenizer":
        with own_stream():
            quantizer = build_quantizer(config.quantizer)
        return ImageTokenizer(quantizer, **asdict(config.image_tokenizer))
    moe = asdict(config.moe)
    weights = {
        "balance": moe.pop("balance_weight") if moe.pop("balance") == "aux" else 0.0,
        "z": moe.pop("z_loss_weight"),
    }
    return LanguageModel(
        config.data.vocabulary,
        config.data.context,
        **asdict(config.language_model),
        loss_weights=weights,
        moe=moe,
    )


def build_quantizer(config: QuantizerConfig) -> AnyQuantizer:
    """The quantizer, or as many of them in a row as it has residual levels."""
    if config.residual_levels == 1:
        return _one_level(config)
    levels = [_one_level(config) for _ in range(config.residual_levels)]
    assert config.gradient != "diveq"
    return ResidualQuantizer(levels, gradient=config.gradient)


def _one_level(q: QuantizerConfig) -> AnyQuantizer:
    weights: dict[str, Any] = {"commitment_weight": q.commitment_weight, "gradient": q.gradient}
    both: dict[str, Any] = weights | {"codebook_weight": q.codebook_weight}
    from_data: dict[str, Any] = {} if q.init == "default" else {"init": q.init}
    if q.kind == "simvq":
        shape = {"transform": q.transform, "base_width": q.base_width}
        learned = {"train_base": q.train_base, "bias": q.bias}
        return SimVQ(q.codes, q.width, **shape, **learned, **both, **from_data)
    if q.kind == "ema":
        averages = {"decay": q.decay, "restart": q.restart}
        return EMAVQ(q.codes, q.width, **averages, **weights, **from_data)
    if q.kind == "fsq":
        return FSQ(q.levels)
    if q.kind in ("lfq", "bsq"):
        family = LFQ if q.kind == "lfq" else BSQ
        return family(q.width, commitment_weight=q.commitment_weight)
    if q.kind == "group_vq":
        assert q.groups is not None
        return GroupVQ(q.codes, q.width, groups=q.groups, **both)
    if q.kind == "mlp_vq":
        return MLPVQ(q.codes, q.width, **both)
    if q.kind == "ibq":
        weights = {"codebook_weight": q.codebook_weight, "commitment_weight": q.commitment_weight}
        return IBQ(q.codes, q.width, **weights)
    return (CosineVQ if q.kind == "cosine_vq" else VQ)(q.codes, q.width, **both, **from_data)
