"""Runs of language models without mixtures, their samples, and what is read from them later."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

from simvq_moe.cli import main
from simvq_moe.config.checks import check
from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.tasks.registry import build_task
from simvq_moe.tasks.text import LanguageModelTask
from tests.launching import ROOT, metrics, run_forked
from tests.short_training import train_flags, train_two_steps
from tests.two_ranks import TwoRanks

TEXT = (
    *("--task", "language_model", "--data.vocabulary", "300", "--data.context", "16"),
    *("--moe.experts", "8", "--moe.top_k", "2", "--moe.hidden", "8", "--train.batch_size", "4"),
    *("--train.eval_batch_size", "256", "--optimizer.lr", "0.01", "--optimizer.warmup_steps", "0"),
)
UNTIED = ("--language_model.moe_every", "2", "--language_model.tied_head", "False")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small corpus of real text."""
    folder = tmp_path_factory.mktemp("corpus")
    for file in sorted((ROOT / "tests" / "core").glob("*.py")):
        (folder / file.name).write_text(file.read_text())
    return str(folder)


def train(tmp_path: Path, world: World, source: str, *flags: str) -> Path:
    """A finished run with its config beside it."""
    config = with_flags(Config(), [*TEXT, "--data.source", source, *flags], "train")
    train_two_steps(config, tmp_path / "runs", world)
    return tmp_path / "runs" / "run"


def test_a_dense_run_leaves_the_records_of_any_run_and_is_reported_beside_a_mixture(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ("--train.steps", "2", "--train.log_every", "1", "--data.source", source)
    for name, every in (("dense", "0"), ("moe", "1")):
        arm = ("--name", name, "--language_model.moe_every", every)
        done = run_forked("train", *TEXT, *steps, *arm, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("used" in done.stderr.splitlines()[-2]) == (name == "moe"), done.stderr
    dense = tmp_path / "runs" / "dense"
    assert {"train/loss", "train/cross_entropy", "train/lr"} <= metrics(dense)[0].keys()
    assert not [key for key in metrics(dense)[0] if "moe" in key or "bank" in key]
    with np.load(dense / "usage.npz") as saved:
        assert saved["counts"].shape == (2, 0, 0)
        assert saved["val_counts"].shape == (1, 0, 0)
    meta = json.loads((dense / "meta.json").read_text())
    assert (meta["layers"], meta["banks"]) == ([], [])
    assert meta["parameters"]["active"] == meta["parameters"]["total"]
    assert meta["flops_per_token"] > 4 * meta["parameters"]["active"]
    out = tmp_path / "report"
    assert main(["report", str(tmp_path / "runs"), "--out", str(out)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| dense")]
    assert len(rows) == 1
    assert "–" in rows[0]
    assert (out / "report.html").stat().st_size > 10_000


def test_samples_continue_held_out_text_alike_at_each_step_and_draw_nothing_else(
    source: str, tmp_path: Path, world: World
) -> None:
    run_dir = train(tmp_path, world, source)
    written = (run_dir / "samples" / "val_000002.txt").read_text()
    assert written.count("=== beginning") == written.count("=== continuation") == 4
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    shown = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    === continuation 4 ===" in shown
    flags = [*TEXT, "--data.source", source, "--data.cache_dir", str(tmp_path / "cache")]
    task = build_task(with_flags(Config(), flags, "train"))
    assert isinstance(task, LanguageModelTask)
    state = torch.get_rng_state()
    first, again, later = (task.continuations(step) for step in (1, 1, 2))
    assert first == again != later
    assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


def test_generate_prints_the_prompt_and_the_same_continuation_for_the_same_seed(
    source: str, tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train(tmp_path, world, source)
    command = ["generate", str(run_dir), "--prompt", "def test", "--tokens", "30", "--seed"]
    printed = []
    for seed in ("1", "1", "2"):
        assert main([*command, seed]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert printed[0].startswith("def test")
    assert len(printed[0]) > 30


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tokens 0", "--tokens 0 < 1"),
        ("--temperature -1", "--temperature -1.0 < 0"),
        ("--tokens 3", "is a run of task 'image_tokenizer'"),
    ],
)
def test_generate_refuses_what_writes_no_text(
    flags: str, words: str, tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_flags(Config(), ["--quantizer.codes", "32"], "train")
    train_two_steps(config, tmp_path / "runs", world)
    assert main(["generate", str(tmp_path / "runs" / "run"), *flags.split()]) == 2
    assert words in capsys.readouterr().err


def test_folding_with_norms_leaves_ones_and_the_same_measures(
    source: str, tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    maps = ("--moe.router.map.kind", "linear", "--moe.expert_in_map.kind", "linear")
    run_dir = train(tmp_path, world, source, *UNTIED, *maps, "--moe.shared_experts", "1")
    out = tmp_path / "folded"
    assert main(["fold", str(run_dir), "--out", str(out), "--merge_norms"]) == 0
    weights = load_file(out / "model.safetensors")
    gains = {name: gain for name, gain in weights.items() if name.endswith("norm.weight")}
    assert len(gains) == 2 * 3 + 1
    assert all(torch.equal(gain, torch.ones(64)) for gain in gains.values())
    measured = []
    for folder in (run_dir, out):
        capsys.readouterr()
        assert main(["eval", str(folder), "--cache_dir", str(tmp_path / "cache")]) == 0
        measured.append(json.loads(capsys.readouterr().out)["val/loss"])
    # float32 rounds the merged matrices
    assert_close(measured[1], measured[0], rtol=1e-4, atol=1e-4)


def test_a_router_into_which_no_gain_can_be_merged_is_named(
    source: str, tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train(tmp_path, world, source, "--moe.router.kind", "cosine")
    out = tmp_path / "folded"
    assert main(["fold", str(run_dir), "--out", str(out), "--merge_norms"]) == 2
    assert "--merge_norms: CosineRouter has no rows" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--language_model.moe_every 4 --language_model.layers 3",
            "language_model.moe_every 4 > language_model.layers 3: no block would have a mixture",
        ),
        (
            "--language_model.moe_every 0 --moe.expert_out_map.kind linear",
            "moe.expert_out_map.kind 'linear' with language_model.moe_every 0, which leaves",
        ),
        ("--language_model.moe_every -1", "language_model.moe_every -1 < 0"),
        ("--train.compile True", "train.compile True with task 'image_tokenizer'"),
        ("--train.activation_checkpointing True", "activation_checkpointing True with task"),
    ],
)
def test_options_that_mean_nothing_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(with_flags(Config(), flags.split(), "train"))
    assert message in str(error.value)


@pytest.mark.distributed
def test_ranks_that_share_experts_checkpoint_activations_and_write_samples(
    source: str, tmp_path: Path, world: World, two_ranks: TwoRanks
) -> None:
    flags = (*TEXT, "--data.source", source, "--train.steps", "4", "--train.log_every", "1")
    shared = ("--moe.expert_parallel", "2", "--train.activation_checkpointing", "True")
    one = train_flags(world, tmp_path, "--name", "plain", *flags)
    two, _ = two_ranks(train_flags, tmp_path, "--name", "shared", *flags, *shared)
    found = []
    for run_dir in (one, two):
        found.append([line["train/loss"] for line in metrics(run_dir)])
        assert (run_dir / "samples" / "val_000004.txt").is_file()
    # sums over ranks round differently, and Adam's first steps magnify it
    assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_compiled_run_trains_what_an_eager_one_does(
    source: str, tmp_path: Path, dtype: str
) -> None:
    flags = (*TEXT, *UNTIED, "--data.source", source, "--train.steps", "4", "--train.dtype", dtype)
    found = []
    for compile in ("False", "True"):
        arm = ("--name", compile, "--train.compile", compile, "--train.log_every", "1")
        done = run_forked("train", *flags, *arm, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found.append([line["train/loss"] for line in metrics(tmp_path / "runs" / compile)])
    # fused kernels round differently: in bfloat16 to 3 digits
    tolerance = 1e-4 if dtype == "fp32" else 1e-2
    assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)
