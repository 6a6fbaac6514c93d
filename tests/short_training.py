"""Train a config for two steps in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from simvq_moe.config import Config
from simvq_moe.config_checks import check
from simvq_moe.merging import to_yaml
from simvq_moe.training.engine import World
from simvq_moe.training.loop import Trainer


def train_two_steps(config: Config, folder: Path, world: World) -> dict[str, float]:
    check(config)
    short = replace(config.train, steps=2, log_every=1, eval_every=2, save_every=2)
    data = replace(config.data, crops=64, held_out_crops=18, cache_dir=str(folder.parent / "cache"))
    config = replace(config, runs_dir=str(folder), train=short, data=data)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    trainer = Trainer(config, world, lambda: False)
    summary = trainer.run()
    trainer.close()
    return summary
