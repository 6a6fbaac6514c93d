"""A run's config and weights, from its folder, which may be anybody's.

What its config says is data: a source is read where a command needs one, and nothing is written
where it says. Whether the weights are those of its model is for the tasks to say.
"""

from __future__ import annotations

from pathlib import Path

from simvq_moe.config.loading import merge_files
from simvq_moe.config.schema import Config, on_one_rank
from simvq_moe.errors import ConfigError
from simvq_moe.files.of_runs import CHECKPOINTS, CONFIG
from simvq_moe.files.tensors import StoredWeights, read_safetensors
from simvq_moe.files.yaml import read_yaml
from simvq_moe.runs import checkpoint

FOLDED = "model.safetensors"
"""Weights of a folded model."""


def read_run(run_dir: Path) -> tuple[Config, StoredWeights]:
    """The config of a run and the weights of its latest checkpoint, or of a folded model.

    Raises:
        ConfigError: it is neither, the run has no whole checkpoint, or its files are broken.
    """
    if not (run_dir / CONFIG).is_file():
        raise ConfigError(f"{run_dir} holds no config.yaml: give the folder of a run")
    config = on_one_rank(merge_files(Config, [run_dir / CONFIG]))
    if (run_dir / FOLDED).is_file():
        weights = read_safetensors(run_dir / FOLDED)
    else:
        weights = checkpoint.newest_weights(run_dir / CHECKPOINTS)
        if weights is None:
            raise ConfigError(f"{run_dir} has no checkpoint: {_way_out(run_dir)}")
    return config, weights


def _way_out(run_dir: Path) -> str:
    """What to do where there are no weights; records of `UsageCallback` say no task."""
    if "task" in read_yaml(run_dir / CONFIG):
        return "train it first"
    return (
        "it holds records of a trainer that keeps its model elsewhere: `simvq-moe watch` and "
        "`dashboard` show them"
    )
