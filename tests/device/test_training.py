"""Short runs on the device: precisions, one rank of experts, resume, compilation, memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import launching
from tests.device.place import DEVICE, on_device

pytestmark = on_device

TEXT = (
    *("train", "--task", "language_model", "--data.source", "corpus", "--data.vocabulary", "300"),
    *("--data.context", "32", "--language_model.width", "32", "--language_model.heads", "2"),
    *("--language_model.layers", "2", "--moe.experts", "8", "--moe.top_k", "2"),
    *("--moe.hidden", "32", "--moe.expert_out_map.kind", "linear", "--train.batch_size", "16"),
    *("--train.log_every", "10", "--train.probe_tokens", "0", "--optimizer.warmup_steps", "0"),
)
STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("device")
    (root / "corpus").mkdir()
    for file in sorted((launching.ROOT / "tests" / "core").glob("*.py")):
        (root / "corpus" / file.name).write_text(file.read_text())
    return root


def train(folder: Path, name: str, *flags: str, steps: int = STEPS) -> list[dict]:
    """The log of a run."""
    lasts = ("--name", name, "--train.steps", str(steps), *flags)
    done = launching.run(*TEXT, *lasts, cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(log: list[dict]) -> list[float]:
    return [line["train/loss"] for line in log if "train/loss" in line]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_loss_falls_in_every_precision(folder: Path, dtype: str) -> None:
    if dtype == "fp16" and DEVICE == "cpu":
        pytest.skip("fp16 needs a GPU")
    found = losses(train(folder, dtype, "--train.dtype", dtype))
    assert found[-1] < 0.95 * found[0]


def test_one_rank_of_experts_is_as_none(folder: Path) -> None:
    plain = losses(train(folder, "plain"))
    alone = losses(train(folder, "alone", "--moe.expert_parallel", "1"))
    assert alone == plain


def test_a_run_goes_on_where_it_was_saved(folder: Path) -> None:
    whole = losses(train(folder, "whole"))
    train(folder, "parts", "--train.save_every", "20", steps=20)
    parts = losses(train(folder, "parts", "--train.save_every", "20"))
    # sums on a GPU have no fixed order
    assert parts == pytest.approx(whole, rel=0 if DEVICE == "cpu" else 1e-3)


def test_a_compiled_run_is_the_same(folder: Path) -> None:
    plain = losses(train(folder, "eager"))
    compiled = losses(train(folder, "compiled", "--train.compile", "true"))
    assert compiled == pytest.approx(plain, rel=1e-2)
