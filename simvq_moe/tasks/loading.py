"""The model of a run, from its folder, which may be anybody's.

Weights are those of the model that its config describes, or the run is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from simvq_moe.config.loading import flatten
from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError
from simvq_moe.files.tensors import StoredWeights
from simvq_moe.runs.loading import read_run
from simvq_moe.tasks.registry import task_of

NOT_BUILT = (ValueError, RuntimeError, TypeError, ArithmeticError, AssertionError, LookupError)
"""What building raises for sizes that go with no model."""


def load_run(run_dir: Path) -> tuple[Config, StoredWeights]:
    """The config of a run and the weights of its latest checkpoint, or of a folded model.

    Raises:
        ConfigError: it is neither, the run has no whole checkpoint, or its files are broken.
    """
    config, weights = read_run(run_dir)
    _check_weights(config, weights, run_dir)
    return config, weights


def load_model(run_dir: str | Path) -> tuple[Config, nn.Module]:
    """The config of a run and its model, in evaluation mode on the CPU; see `load_run`."""
    config, weights = load_run(Path(run_dir))
    return config, model_of(config, weights).eval()


def model_of(config: Config, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model of a config with the weights that `load_run` has found to be its own."""
    task = task_of(config)
    model = task.build_model(task.without_networks(config))
    take_weights(model, weights)
    return model


@torch.no_grad()
def take_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights that `load_run` has found to be a model's own into it, one at a time."""
    state = model.state_dict()
    for name, tensor in state.items():
        tensor.copy_(weights[name])
    # modules note what was loaded, such as that a codebook has started
    model.load_state_dict(state)


def described(config: Config) -> nn.Module:
    """The model of a config without memory of its own, because its sizes may be anything."""
    task = task_of(config)
    with torch.device("meta"):
        return task.build_model(task.without_networks(config))


def _check_weights(config: Config, weights: StoredWeights, run_dir: Path) -> None:
    """Raise `ConfigError` unless the weights are those of the config's model."""
    flat = flatten(config)
    for key in task_of(config).depths:
        if flat[key] > len(weights):
            raise _misfit(run_dir, f"{key} {flat[key]} with only {len(weights)} tensors")
    try:
        state = described(config).state_dict()
    except NOT_BUILT as error:
        raise _misfit(run_dir, f"no such model can be built: {error}") from None
    for name in sorted(state.keys() ^ weights.keys()):
        raise _misfit(run_dir, f"{name} is {'missing' if name in state else 'not of it'}")
    for name, tensor in state.items():
        shape = weights.forms[name].shape
        if tuple(tensor.shape) != shape:
            shapes = f"{shape}, not {tuple(tensor.shape)}"
            raise _misfit(run_dir, f"{name} has the shape {shapes}")


def _misfit(run_dir: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{run_dir}: the weights are not those of the model in config.yaml ({reason}): put both "
        "back as they were, or train again"
    )
