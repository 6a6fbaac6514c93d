"""A user's own DeepSpeed settings: merged where they are free, named where they are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from simvq_moe.config import Config
from simvq_moe.merging import ConfigError
from simvq_moe.training.engine import World
from simvq_moe.training.engine_settings import DECIDED, engine_settings
from tests.short_training import train_two_steps

OFFLOAD = {
    "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}


def config_with(path: Path) -> Config:
    config = Config(task="language_model")
    return replace(config, train=replace(config.train, deepspeed_config=str(path)))


def settings_of(folder: Path, theirs: Any) -> dict[str, Any]:
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(theirs))
    return engine_settings(config_with(path))


def test_free_settings_go_on_top_of_ours(tmp_path: Path) -> None:
    ours, merged = engine_settings(Config()), settings_of(tmp_path, OFFLOAD)
    assert merged["zero_optimization"] == {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    assert merged["zero_force_ds_cpu_optimizer"] is False
    assert merged.items() >= {k: v for k, v in ours.items() if k != "zero_optimization"}.items()


@pytest.mark.parametrize("key", DECIDED)
def test_what_the_config_decides_is_refused_by_name(tmp_path: Path, key: str) -> None:
    name, _, inner = key.partition(".")
    with pytest.raises(ConfigError, match=f"sets '{key}', which {DECIDED[key]} decides"):
        settings_of(tmp_path, {name: {inner: 1} if inner else 1})


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"comms_loger": {}}, "no setting 'comms_loger': drop it. Did you mean comms_logger"),
        ({"zero_optimization": {"offload": 1}}, "zero_optimization.offload: Extra inputs"),
        ({"zero_optimization": 2}, "are objects"),
        ([1], "are objects"),
    ],
)
def test_what_deepspeed_would_take_silently_or_late_is_refused(
    tmp_path: Path, theirs: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of(tmp_path, theirs)


def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory: give a JSON file"):
        engine_settings(config_with(tmp_path / "none.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        engine_settings(config_with(tmp_path / "broken.json"))


def test_an_offloaded_optimizer_trains_the_same(tmp_path: Path, world: World) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(OFFLOAD))
    small = {"language_model": replace(Config().language_model, layers=1, width=16)}
    data = replace(Config().data, vocabulary=300, context=16, source=str(Path(__file__).parent))
    config = replace(config_with(path), data=data, **small)
    plain = replace(config, train=replace(config.train, deepspeed_config=None))
    losses = [
        train_two_steps(c, tmp_path / str(i), world)["val/loss"]
        for i, c in enumerate((config, plain))
    ]
    torch.testing.assert_close(losses[0], losses[1])
