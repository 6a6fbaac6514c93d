"""Held-out measures of a finished run's model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from simvq_moe.config.checks_values import check_text
from simvq_moe.config.schema import Config, DataConfig
from simvq_moe.engine.devices import this_device
from simvq_moe.engine.world import World
from simvq_moe.tasks.loading import load_run, take_weights
from simvq_moe.tasks.registry import task_of
from simvq_moe.training.evaluation import evaluate


def evaluate_run(
    run_dir: Path,
    source: str | None,
    *,
    measures: Sequence[str] = (),
    cache_dir: Path | None = None,
) -> dict[str, float]:
    """Measures of the run's model over its held-out set, or over that of another source.

    Args:
        measures: further ones, such as "lpips" and "rfid" of image tokenizers, which need networks.
        cache_dir: folder of what is derived from text; None: the usual one, below the working
            directory. The config of a run does not say where its readers write.
    """
    if cache_dir is not None:
        check_text("--cache_dir", str(cache_dir))
    config, weights = load_run(run_dir)
    if source is not None:
        task_of(config).check_same_meaning(config, source)
        config = with_source(config, source)
    config = _with_cache(task_of(config).without_networks(config), cache_dir)
    task_of(config).check_files(config)
    task = task_of(config).of_run(config, run_dir=run_dir, measures=measures)
    take_weights(task.model, weights)
    device = this_device()
    task.model.to(device)
    return evaluate(task, World(0, 1, device), config.train.eval_batch_size)[0]


def with_source(config: Config, source: str) -> Config:
    """The config that reads another source, held-out part and all, in place of whatever it read.

    Raises:
        ConfigError: it is empty, or can't be printed.
    """
    check_text("--data", source)
    alone = {"held_out_source": None, "sources": (), "source_weights": ()}
    return replace(config, data=replace(config.data, source=source, **alone))


def _with_cache(config: Config, cache_dir: Path | None) -> Config:
    """The config that derives files from its data into a folder that the user has named, or else
    into the usual one below the working directory, wherever the config wanted them."""
    named = DataConfig().cache_dir if cache_dir is None else str(cache_dir)
    return replace(config, data=replace(config.data, cache_dir=named))
