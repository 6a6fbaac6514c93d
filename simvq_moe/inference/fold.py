"""A run's model without shared maps: every map is merged into the rows that it maps (`Bank.fold`),
so that the model of a config without maps computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from simvq_moe.config.loading import to_yaml
from simvq_moe.config.schema import Config
from simvq_moe.core.bank import Bank
from simvq_moe.core.whitening import Whitening
from simvq_moe.errors import ConfigError
from simvq_moe.files.of_runs import CONFIG
from simvq_moe.files.regular import write_atomically, written_whole
from simvq_moe.files.tensors import StoredWeights, forms_of, write_safetensors
from simvq_moe.files.unfinished import check_free, filling
from simvq_moe.moe import MoE
from simvq_moe.quantizers import RunningMapVQ
from simvq_moe.runs.loading import FOLDED
from simvq_moe.tasks.loading import described, load_run, model_of
from simvq_moe.tasks.registry import AnyTask, task_of

LARGEST_DIFFERENCE = 1e-9
"""Between outputs before and after folding, in float64, relative to the largest output."""


@dataclass(frozen=True)
class Folded:
    """A run's model without maps."""

    config: Config
    """The config of the model without maps."""
    weights: Mapping[str, Tensor]
    """Weights in float32; those of a run without maps are read where they are asked for."""
    difference: float
    """The largest between outputs before and after, in float64, relative to the largest output."""
    files: Mapping[str, bytes]
    """What the run keeps beside its weights, by name."""
    made_of: str
    """Digest of the run's weights."""


def fold_run(run_dir: Path, out: Path, *, merge_norms: bool = False) -> float:
    """Write model.safetensors and config.yaml of the same model without maps.

    Returns the largest difference between the outputs of both in float64, relative to the largest
    output; nothing is written unless it is rounding. Killed at any moment, the same call goes on.

    Args:
        merge_norms: also merge the gains of norms, see `LanguageModel.merge_norms_`.

    Raises:
        ConfigError: the run has nothing to fold, or something that can't be.
    """
    check_free(out)
    folded = folded_run(run_dir, merge_norms=merge_norms)
    with filling(out, "fold", {"weights": folded.made_of, "merge_norms": merge_norms}):
        write_model(out, folded.config, folded.weights, folded.files)
    return folded.difference


def folded_run(run_dir: Path, *, merge_norms: bool = False, plain: bool = False) -> Folded:
    """The model of a run without maps, which computes what it did with them.

    Args:
        merge_norms: see `fold_run`.
        plain: take a model that has no maps as it is.

    Raises:
        ConfigError: the run has nothing to fold, or something that can't be.
    """
    config, weights = load_run(run_dir)
    task = task_of(config)
    files, made_of = task.kept_files(config, run_dir), weights.digest()
    if not (merge_norms or has_maps(described(config))):
        if plain:
            return Folded(config, as_built(config, weights), 0.0, files, made_of)
        norms = " but norms: --merge_norms" if task.has_norms else ""
        raise ConfigError(f"{run_dir} has no shared map: there is nothing to fold{norms}")
    model = model_of(config, weights).double().eval()
    folded_config = task.without_maps(config)
    folded = task.build_model(task.without_networks(folded_config)).double().eval()
    try:
        folded.load_state_dict(fold_weights(model))
    except ValueError as error:  # of a layer that says why it can't be folded
        raise ConfigError(f"{run_dir}: {error}") from None
    if merge_norms:
        task.merge_norms(folded)
    difference = _difference(task, (model, folded), config)
    if not difference <= LARGEST_DIFFERENCE:
        raise ConfigError(
            f"folding {run_dir} changes its outputs by {difference:.2g} of the largest, or they "
            "are not finite: the run has diverged, use another checkpoint or train again"
        )
    return Folded(folded_config, folded.float().state_dict(), difference, files, made_of)


def has_maps(model: nn.Module) -> bool:
    """Whether there is anything to fold."""
    return any(
        (isinstance(module, Bank) and module.maps) or isinstance(module, Whitening | RunningMapVQ)
        for module in model.modules()
    )


def as_built(config: Config, weights: Mapping[str, Tensor]) -> StoredWeights:
    """Weights in the types that a model has of them which computes in float32."""
    forms = forms_of(described(config).float().state_dict())
    return StoredWeights(forms, lambda name: weights[name].to(forms[name].dtype))


def write_model(
    out: Path, config: Config, weights: Mapping[str, Tensor], files: Mapping[str, bytes]
) -> None:
    """A folder that is taken for a run: config.yaml comes last, and with it the folder is one."""
    write_weights(out / FOLDED, weights)
    for name, content in files.items():
        write_atomically(out / name, content)
    write_atomically(out / CONFIG, to_yaml(config))


def write_weights(
    path: Path, weights: Mapping[str, Tensor], notes: dict[str, str] | None = None
) -> None:
    """A safetensors file, whole; see `write_safetensors`."""
    with written_whole(path) as aside:
        write_safetensors(aside, weights, notes)


def fold_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model with every bank, whitening and running map folded."""
    weights = dict(model.state_dict())
    layers = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    for name, module in model.named_modules():
        in_layer = any(name.startswith(f"{layer}.") for layer in layers)  # which folds as a whole
        if isinstance(module, Bank | MoE | RunningMapVQ) and not in_layer:
            for key in [key for key in weights if key.startswith(f"{name}.")]:
                del weights[key]
            weights |= {f"{name}.{k}": v for k, v in module.fold().state_dict().items()}
    return {name: tensor for name, tensor in weights.items() if not name.endswith("initialized")}


@torch.no_grad()
def _difference(task: type[AnyTask], models: Sequence[nn.Module], config: Config) -> float:
    """The largest between the outputs of both models, relative to the first one's largest."""
    outputs = []
    for model in models:
        torch.manual_seed(0)
        outputs.append(task.outputs_of_noise(model, config))
    before, after = outputs
    return float((after - before).abs().max() / before.abs().max())
