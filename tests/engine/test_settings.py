"""A user's own DeepSpeed settings: merged where they are free, named where they are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config, OptimizerConfig
from simvq_moe.engine.optimizer import choose_kernel, make_optimizer
from simvq_moe.engine.settings import DECIDED, check_device, engine_settings, zero_stage
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from tests.launching import ROOT
from tests.short_training import train_two_steps

OFFLOAD = {
    "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}


SMALL = (
    *("--language_model.layers", "1", "--language_model.width", "16", "--data.context", "16"),
    *("--data.vocabulary", "300", "--data.source", str(Path(__file__).parent)),
)
EXAMPLES = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
ON_GPU = torch.device("cuda")


def config_with(path: Path) -> Config:
    config = Config(task="language_model")
    return replace(config, train=replace(config.train, deepspeed_config=str(path)))


def settings_of(folder: Path, theirs: Any) -> dict[str, Any]:
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(theirs))
    return engine_settings(config_with(path), 2)


def test_free_settings_go_on_top_of_ours(tmp_path: Path) -> None:
    ours, merged = engine_settings(Config(), 2), settings_of(tmp_path, OFFLOAD)
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
        engine_settings(config_with(tmp_path / "none.json"), 1)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        engine_settings(config_with(tmp_path / "broken.json"), 1)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains_as_a_run_without_it(example: Path, tmp_path: Path, world: World) -> None:
    config = with_flags(config_with(example), SMALL, "train")
    if "offload_param" in engine_settings(config, 1)["zero_optimization"]:
        pytest.skip("needs stage 3: see test_engine_stages")
    plain = replace(config, train=replace(config.train, deepspeed_config=None))
    losses = [
        train_two_steps(c, tmp_path / str(i), world)["val/loss"]
        for i, c in enumerate((config, plain))
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_stage_0_takes_no_settings_of_zero(tmp_path: Path) -> None:
    config = config_with(EXAMPLES[0])
    (tmp_path / "zero.json").write_text(json.dumps(OFFLOAD))
    settings = {"deepspeed_config": str(tmp_path / "zero.json"), "zero_stage": 0}
    with pytest.raises(
        ConfigError, match=r"'zero_optimization', which train\.zero_stage 0 switches"
    ):
        engine_settings(replace(config, train=replace(config.train, **settings)), 1)


@pytest.mark.parametrize(
    ("ranks", "flags", "stage"),
    [
        (1, (), 0),
        (1, ("--train.zero_stage", "2"), 0),
        (1, ("--train.zero_stage", "3"), 3),
        (1, ("--train.dtype", "bf16"), 1),
        (1, ("--train.on_not_finite", "skip"), 1),
        (1, ("--train.deepspeed_config", str(EXAMPLES[0])), 1),
        (2, (), 1),
    ],
)
def test_one_rank_shards_nothing_where_stage_0_is_right(
    ranks: int, flags: tuple[str, ...], stage: int
) -> None:
    assert zero_stage(with_flags(Config(), flags, "train"), ranks) == stage


def test_fp16_scales_the_loss_and_needs_a_gpu() -> None:
    config = with_flags(Config(), ("--train.dtype", "fp16"), "train")
    settings = engine_settings(config, 1)
    assert settings["fp16"] == {"enabled": True}
    assert settings["bf16"] == {"enabled": False}
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config

    assert DeepSpeedFP16Config(**settings["fp16"]).loss_scale == 0, "0 stands for dynamic"
    check_device(Config())
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="'fp16' needs a GPU, and there is none here: use"):
            check_device(config)


def test_without_a_gpu_the_optimizer_is_torchs_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    settings = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]}]
    optimizer = make_optimizer(groups, OptimizerConfig(), settings, torch.device("cpu"))
    assert type(optimizer) is torch.optim.AdamW
    assert settings["zero_force_ds_cpu_optimizer"] is False
    assert caplog.messages == [
        "optimizer: torch's AdamW: without a GPU DeepSpeed's takes minutes to compile and gains "
        "nothing"
    ]


def test_on_a_gpu_a_user_may_ask_for_torchs_optimizer_on_the_cpu() -> None:
    settings = {"zero_optimization": OFFLOAD["zero_optimization"]}
    assert choose_kernel(settings, ON_GPU)[0] in ("DeepSpeedCPUAdam", "AdamW")
    settings |= {"zero_force_ds_cpu_optimizer": False}
    assert choose_kernel(settings, ON_GPU) == ("AdamW", "zero_force_ds_cpu_optimizer is false")


def test_on_a_gpu_the_optimizer_is_torchs_unless_it_is_offloaded() -> None:
    settings = {"zero_optimization": {"stage": 1}}
    assert choose_kernel(settings, ON_GPU) == ("AdamW", "its fused kernel comes with torch")
