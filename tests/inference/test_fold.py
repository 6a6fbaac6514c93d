"""Runs as models: evaluated and folded from their checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from simvq_moe.cli import main
from simvq_moe.config.flags import with_flags
from simvq_moe.config.loading import merge_files
from simvq_moe.config.schema import Config
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.tasks.registry import build_model
from simvq_moe.tasks.text import LanguageModelTask
from tests.short_training import train_two_steps

FLAGS = {
    "image": ("--quantizer.codes", "32", "--quantizer.bias", "True", "--optimizer.lr", "0.01"),
    "residual": ("--quantizer.codes", "32", "--quantizer.residual_levels", "2"),
    "running map": ("--quantizer.codes", "32", "--quantizer.kind", "running_map"),
    "text": (
        *("--task", "language_model", "--moe.expert_out_map.kind", "linear", "--moe.experts", "8"),
        *("--moe.router.map.kind", "linear", "--moe.router.map.base_width", "4"),
        *("--moe.expert_in_map.kind", "diagonal", "--optimizer.lr", "0.01"),
        *("--moe.expert_out_bias", "True"),
    ),
}


def train(tmp_path: Path, world: World, *flags: str) -> tuple[Path, dict[str, float]]:
    """A finished run with its config beside it, as `train` leaves it."""
    config = with_flags(Config(), flags, "train")
    summary = train_two_steps(config, tmp_path / "runs", world)
    return tmp_path / "runs" / "run", summary


@pytest.mark.parametrize("kind", FLAGS)
def test_the_folded_model_loads_without_maps_and_differs_by_rounding(
    kind: str, tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = train(tmp_path, world, *FLAGS[kind])
    assert main(["fold", str(run), "--out", str(tmp_path / "folded")]) == 0
    assert "outputs differ by" in capsys.readouterr().err
    weights = load_file(tmp_path / "folded" / "model.safetensors")
    assert not [name for name in weights if name.endswith((".W", ".bias")) and "bank" in name]
    config = merge_files(Config, [tmp_path / "folded" / "config.yaml"])
    build_model(config).load_state_dict(weights)
    measured = []
    for folder in (run, tmp_path / "folded"):
        assert main(["eval", str(folder), "--cache_dir", str(tmp_path / "cache")]) == 0
        measured.append(json.loads(capsys.readouterr().out)["val/loss"])
    # float32 rounds the folded rows
    assert_close(measured[1], measured[0], rtol=1e-3, atol=1e-4)


def test_a_bias_that_can_not_be_folded_is_refused_in_a_line(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = train(tmp_path, world, *FLAGS["text"], "--moe.gates", "softmax_topk")
    assert main(["fold", str(run), "--out", str(tmp_path / "folded")]) == 2
    assert "expert_out_bias with gates 'softmax_topk' can't be folded" in capsys.readouterr().err
    assert not (tmp_path / "folded").exists()


def test_evaluation_of_a_checkpoint_repeats_the_measures_of_the_run(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    run, summary = train(tmp_path, world, *FLAGS["image"])
    assert main(["eval", str(run)]) == 0
    measured = json.loads(capsys.readouterr().out)
    for name, value in measured.items():
        assert_close(value, summary[name])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("eval nowhere", "nowhere holds no config.yaml"),
        ("fold run --out folded", "has no shared map: there is nothing to fold"),
        ("fold run --out run", "--out run is not empty: give a new folder"),
    ],
)
def test_what_can_not_be_loaded_or_folded_is_refused(
    command: str,
    words: str,
    tmp_path: Path,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = train(tmp_path, world, "--quantizer.kind", "vq", "--quantizer.codes", "32")
    monkeypatch.chdir(run.parent)
    assert main(command.split()) == 2
    assert words in capsys.readouterr().err
    assert not (run.parent / "folded").exists()


def test_another_source_is_read_with_the_tokenizer_of_the_run(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("own", "to be or not to be, "), ("other", "not to be, or to be! ")):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.txt").write_text(f"{i} {text}" * 400)
    flags = ("--data.vocabulary", "270", "--data.context", "16", "--data.source")
    run, summary = train(tmp_path, world, *FLAGS["text"], *flags, str(tmp_path / "own"))
    tokenizer = (run / "tokenizer.json").read_bytes()
    measured = []
    cache = ("--cache_dir", str(tmp_path / "cache"))
    for name in ("own", "other"):
        assert main(["eval", str(run), "--data", str(tmp_path / name), *cache]) == 0
        measured.append(json.loads(capsys.readouterr().out))
    assert_close(measured[0]["val/bits_per_byte"], summary["val/bits_per_byte"])
    assert measured[1]["val/bits_per_byte"] != measured[0]["val/bits_per_byte"]
    encoded = list((tmp_path / "cache").glob("text-*/tokenizer.json"))
    assert len(encoded) == 3
    assert all(file.read_bytes() == tokenizer for file in encoded)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_tokenizer_that_is_no_regular_file_is_not_passed_over(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"tokenizer.json"):
        LanguageModelTask.kept_files(Config(), tmp_path)
