"""A run's config and weights, from its folder, which may be anybody's.

What its config says is data: a source is read where a command needs one, and nothing is written
where it says. Weights are those of the model that it describes, or the run is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from simvq_moe.config.schema import Config, DataConfig, on_one_rank
from simvq_moe.config.loading import ConfigError, flatten, merge_files
from simvq_moe.files.tensors import read_safetensors
from simvq_moe.runs import checkpoint
from simvq_moe.tasks.models import AnyModel, build_model

FOLDED = "model.safetensors"
"""Weights of a folded model."""
DEPTHS = (
    *("language_model.layers", "quantizer.residual_levels", "image_tokenizer.residual_blocks"),
    *("image_tokenizer.downsamplings", "image_tokenizer.discriminator_layers"),
)
"""Keys of which every unit has a tensor of its own, or more."""
NOT_BUILT = (ValueError, RuntimeError, TypeError, ArithmeticError, AssertionError, LookupError)
"""What building raises for sizes that go with no model."""

Model = TypeVar("Model", bound=nn.Module)


def load_run(run_dir: Path) -> tuple[Config, dict[str, Tensor]]:
    """The config of a run and the weights of its latest checkpoint, or of a folded model.

    Raises:
        ConfigError: it is neither, the run has no whole checkpoint, or its files are broken.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} holds no config.yaml: give the folder of a run")
    config = on_one_rank(merge_files(Config, [run_dir / "config.yaml"]))
    if (run_dir / FOLDED).is_file():
        weights = read_safetensors(run_dir / FOLDED)
    else:
        step = checkpoint.latest_step(run_dir / "checkpoints")
        if step is None:
            raise ConfigError(f"{run_dir} has no checkpoint: train it first")
        weights = checkpoint.load_weights(run_dir / "checkpoints" / str(step))
    _check_weights(config, weights, run_dir)
    return config, weights


def load_model(run_dir: Path) -> tuple[Config, AnyModel]:
    """The config of a run and its model, in evaluation mode on the CPU; see `load_run`."""
    config, weights = load_run(run_dir)
    return config, fill(build_model(without_networks(config)), weights).eval()


def fill(model: Model, weights: Mapping[str, Tensor]) -> Model:
    """The model with the weights that `load_run` has found to be its own."""
    model.load_state_dict(weights)
    return model


def without_networks(config: Config) -> Config:
    """The config of the same model whose loss needs no network of others: LPIPS's judges while a
    model learns, and its file may be on another machine."""
    return replace(
        config, image_tokenizer=replace(config.image_tokenizer, lpips_weight=0.0, lpips_file=None)
    )


def with_cache(config: Config, cache_dir: Path | None = None) -> Config:
    """The config that derives files from its data into a folder that the user has named, or else
    into the usual one below the working directory, wherever the config wanted them."""
    named = DataConfig().cache_dir if cache_dir is None else str(cache_dir)
    return replace(config, data=replace(config.data, cache_dir=named))


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Of every weight's name, type, shape and bytes, in whatever files they lie."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_weights(config: Config, weights: Mapping[str, Tensor], run_dir: Path) -> None:
    """Raise `ConfigError` unless the weights are those of the config's model, which is described
    first and not built, for its sizes may be anything."""
    flat = flatten(config)
    for key in DEPTHS:
        if flat[key] > len(weights):
            raise _misfit(run_dir, f"{key} {flat[key]} with only {len(weights)} tensors")
    try:
        with torch.device("meta"):
            described = build_model(without_networks(config)).state_dict()
    except NOT_BUILT as error:
        raise _misfit(run_dir, f"no such model can be built: {error}") from None
    for name in sorted(described.keys() ^ weights.keys()):
        raise _misfit(run_dir, f"{name} is {'missing' if name in described else 'not of it'}")
    for name, tensor in described.items():
        if tensor.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            raise _misfit(run_dir, f"{name} has the shape {shapes}")


def _misfit(run_dir: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{run_dir}: the weights are not those of the model in config.yaml ({reason}): put both "
        "back as they were, or train again"
    )
