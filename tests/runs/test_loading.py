"""A run's folder is data that may be anybody's: read where a command needs it, written nowhere."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from simvq_moe.cli import main
from simvq_moe.config.flags import with_flags
from simvq_moe.config.loading import merge_files, to_yaml
from simvq_moe.config.schema import Config
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.runs.checkpoint import committed_steps
from simvq_moe.runs.loading import FOLDED
from simvq_moe.tasks.loading import load_model, load_run
from simvq_moe.tasks.registry import build_model
from tests.live_memory import peak_bytes
from tests.short_training import train_two_steps

IMAGE = ("--quantizer.codes", "16", "--image_tokenizer.hidden", "4")
TEXT = (
    *("--task", "language_model", "--moe.experts", "4", "--moe.top_k", "2", "--moe.hidden", "4"),
    *("--language_model.layers", "1", "--language_model.width", "8", "--language_model.heads", "2"),
    *("--train.batch_size", "4", "--train.probe_tokens", "0", "--data.vocabulary", "257"),
    *("--moe.expert_out_map.kind", "linear"),
)
PLAIN = (
    *TEXT[:-2],
    *("--language_model.layers", "4", "--moe.experts", "16", "--moe.hidden", "512"),
)


def run_of(folder: Path, *flags: str) -> tuple[Path, Config, dict[str, Tensor]]:
    """A folder of an untrained model, its config and its weights."""
    config = with_flags(Config(), flags, "train")
    weights = {name: w.contiguous() for name, w in build_model(config).state_dict().items()}
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    save_file(weights, folder / FOLDED)
    return folder, config, weights


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    folder = tmp_path_factory.mktemp("text")
    train_two_steps(with_flags(Config(), TEXT, "train"), folder / "runs", world)
    return folder / "runs" / "run"


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    """A run without maps, of several large tensors."""
    folder = tmp_path_factory.mktemp("plain")
    train_two_steps(with_flags(Config(), PLAIN, "train"), folder / "runs", world)
    return folder / "runs" / "run"


def test_a_model_without_maps_is_exported_a_tensor_at_a_time(
    plain_run: Path, tmp_path: Path
) -> None:
    _, weights = load_run(plain_run)
    sizes = [weight.nbytes for weight in weights.values()]
    command = ["export", str(plain_run), "--to", "safetensors", "--out", str(tmp_path / "out")]
    assert peak_bytes(lambda: main(command)) < 1.2 * max(sizes) < 0.2 * sum(sizes)
    assert_close(load_file(tmp_path / "out" / FOLDED), dict(weights), rtol=0, atol=0)


def test_a_model_takes_its_weights_one_at_a_time(plain_run: Path) -> None:
    config, weights = load_run(plain_run)
    largest = max(weight.nbytes for weight in weights.values())
    built = peak_bytes(lambda: build_model(config))
    assert peak_bytes(lambda: load_model(plain_run)) < built + 1.2 * largest
    assert_close(dict(load_model(plain_run)[1].state_dict()), dict(weights), rtol=0, atol=0)


def copy_of(run: Path, folder: Path, **data: str) -> Path:
    """What eval needs of a run, with other values in its config."""
    folder.mkdir()
    config = merge_files(Config, [run / "config.yaml"])
    config = replace(config, data=replace(config.data, **data))
    (folder / "config.yaml").write_text(to_yaml(config))
    for name in ("checkpoints", "tokenizer.json"):
        (folder / name).symlink_to(run / name)
    return folder


def test_eval_writes_where_it_runs_or_is_told_and_never_where_the_run_says(
    text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "home" / "private"
    victim.mkdir(parents=True)
    run = copy_of(text_run, tmp_path / "theirs", cache_dir=str(victim))
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(run)]) == 0
    assert not list(victim.iterdir())
    assert [path.name[:5] for path in Path(".cache").iterdir()] == ["text-"]
    assert main(["eval", str(run), "--cache_dir", "mine"]) == 0
    assert [path.name[:5] for path in Path("mine").iterdir()] == ["text-"]
    assert not list(victim.iterdir())


def test_a_tokenizer_that_a_run_only_names_is_not_fetched(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(text_run, tmp_path / "theirs", tokenizer="somebody/tokenizer")
    (run / "tokenizer.json").unlink()
    assert main(["eval", str(run)]) == 2
    assert "has no tokenizer.json, its copy of data.tokenizer" in capsys.readouterr().err


def test_a_link_in_place_of_the_tokenizer_publishes_nothing(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(text_run, tmp_path / "theirs")
    (tmp_path / "secret").write_text("secret")
    (run / "tokenizer.json").unlink()
    (run / "tokenizer.json").symlink_to(tmp_path / "secret")
    assert main(["fold", str(run), "--out", str(tmp_path / "folded")]) == 2
    assert not (tmp_path / "folded").exists()
    assert "tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--quantizer.codes", "17"), "has the shape"),
        (("--image_tokenizer.hidden", "1000000"), "has the shape"),
        (("--image_tokenizer.residual_blocks", "1000000"), "with only"),
        (("--quantizer.residual_levels", "1000000"), "with only"),
        (("--quantizer.kind", "vq"), "is missing|is not of it"),
        (("--quantizer.bias", "True"), "is missing|has the shape"),
        (("--image_tokenizer.residual_blocks", "0"), "is missing|is not of it|has the shape"),
        (("--image_tokenizer.architecture", "vqgan"), "with|missing|built|not of it"),
        (TEXT, "is missing|is not of it"),
    ],
)
def test_weights_of_another_model_are_refused_before_one_is_built(
    flags: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    run, config, _ = run_of(tmp_path / "run", *IMAGE)
    load_model(run)
    (run / "config.yaml").write_text(to_yaml(with_flags(config, flags, "train")))
    with pytest.raises(ConfigError, match=words):
        load_run(run)


def test_files_that_hold_no_weights_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _, _ = run_of(tmp_path / "run", *IMAGE)
    whole = (run / FOLDED).read_bytes()
    for content in (b"", b"<html>", whole[:-1], b"\xff" * 8 + whole[8:]):
        (run / FOLDED).write_bytes(content)
        assert main(["eval", str(run)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "model.safetensors holds no tensors" in line
    (run / FOLDED).unlink()
    os.mkfifo(run / FOLDED)
    assert main(["eval", str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "changed",
    [
        *({"files": None}, {"files": {"model_0.safetensors": {}}}, {"files": {"index.json": []}}),
        *({"world_size": 2**40}, {"world_size": 0}, {"counters": {}}, {"step": "2"}),
    ],
)
def test_a_manifest_of_another_schema_is_passed_over_by_name(
    changed: dict[str, Any], text_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(text_run, run)
    (manifest,) = run.glob("checkpoints/*/manifest.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changed))
    with pytest.raises(ConfigError, match="has no checkpoint"):
        load_run(run)
    (key,) = changed
    assert f"is skipped: its manifest.json has {key}" in caplog.text or "ranks have" in caplog.text


def test_records_of_another_trainer_are_told_from_a_run_without_a_checkpoint(
    tmp_path: Path,
) -> None:
    written = tmp_path / "config.yaml"
    for content, way in (
        (to_yaml(Config()), "train it first"),
        ("name: a\ntrain:\n  steps: 4\n", "records of a trainer that keeps its model elsewhere"),
    ):
        written.write_text(content)
        with pytest.raises(ConfigError, match=f"has no checkpoint: .*{way}"):
            load_run(tmp_path)


def test_only_folders_named_like_steps_are_checkpoints(text_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(text_run, run)
    before = committed_steps(run / "checkpoints")
    for name in ("²", "٣", "007", "-1", "1.tmp", "before"):
        (run / "checkpoints" / name).mkdir()
    assert committed_steps(run / "checkpoints") == before
    load_run(run)


def test_a_model_that_has_diverged_is_named_and_nothing_is_written(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, weights = load_run(text_run)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "tokenizer.json").symlink_to(text_run / "tokenizer.json")
    save_file({name: torch.full_like(w, float("nan")) for name, w in weights.items()}, run / FOLDED)
    for command in (["fold", str(run), "--out", str(tmp_path / "out")], ["generate", str(run)]):
        assert main(command) == 2
        captured = capsys.readouterr()
        assert "the run has diverged" in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--prompt", "\udcff\udcfe"), "is no UTF-8"),
        (("--seed", "99999999999999999999999"), "--seed 9"),
        (("--seed", "-99999999999999999999999"), "--seed -9"),
        (("--temperature", "1e-40"), "use 0 for the best token"),
        (("--temperature", "nan"), "--temperature nan < 0"),
        (("--top_k", "-1"), "--top_k -1 < 0"),
        (("--tokens", "0"), "--tokens 0 < 1"),
    ],
)
def test_what_can_not_be_drawn_with_is_one_line(
    flags: tuple[str, str], words: str, text_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(text_run), *flags]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_a_prompt_is_encoded_as_documents_are(
    text_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer

    from simvq_moe.models.language_model import LanguageModel

    given = []

    def generate(_: LanguageModel, tokens: Tensor, *__: int, **___: object) -> Tensor:
        given.append(tokens[0].tolist())
        return tokens

    monkeypatch.setattr(LanguageModel, "generate", generate)
    prompt = "a<|endoftext|>é"
    assert main(["generate", str(text_run), "--prompt", prompt]) == 0
    tokenizer = Tokenizer.from_file(str(text_run / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    # bytes alone: as many tokens as bytes, the quoted special token among them
    assert given == [[0, *tokenizer.encode(prompt, add_special_tokens=False).ids]]
    assert len(given[0]) == 1 + len(prompt.encode())
