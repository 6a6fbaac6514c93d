"""Models from the config; the same seed gives arms the same weights where their shapes allow."""

from __future__ import annotations

from typing import Any

from simvq_moe.config.schema import Config, QuantizerConfig
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
from simvq_moe.tasks.registry import task_of


def build_model(config: Config) -> Any:
    """The model of the config's task, started from its seed."""
    return task_of(config).build_model(config)


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
