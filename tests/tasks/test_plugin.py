"""A task of a user's own: its data, model and options in one file, then it trains like ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.quantizers.test_plugin import cli

SMALL = (
    *("--train.steps", "4", "--train.batch_size", "8", "--data.crops", "64", "--name", "mine"),
    *("--data.held_out_crops", "16", "--quantizer.codes", "8", "--quantizer.width", "4"),
)


def test_a_task_of_one_file_trains_is_measured_folded_and_swept(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parent / "my_task.py", tmp_path)
    text = "plugins: [my_task.py]\ntask: points\ntask_options: {kind: points, hidden: 6}\n"
    text += "moe: {experts: 4, top_k: 2, hidden: 3}\n"
    (tmp_path / "mine.yaml").write_text(text)
    train = ("train", "--config", "mine.yaml", *SMALL)
    unknown = cli(tmp_path, "train", "--task", "points", *SMALL)
    assert unknown.returncode == 2
    assert "task 'points': use one of 'audio_tokenizer', " in unknown.stderr
    wrong = cli(tmp_path, *train, "--data.source", "square")
    assert wrong.returncode == 2, wrong.stderr
    assert "data.source 'square': use one of 'circle', 'ellipse'" in wrong.stderr
    foreign = cli(tmp_path, *train, "--train.compile", "True")
    assert foreign.returncode == 2, foreign.stderr
    assert "train.compile True with task 'points': only 'language_model' has it" in foreign.stderr
    dry = cli(tmp_path, *train, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert json.loads(dry.stdout)["flops_per_token"] > 0
    assert "image_tokenizer:" not in dry.stderr
    done = cli(tmp_path, *train)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/mine/summary.json").read_text())
    assert summary["val/codes/used"] > 0
    assert summary["val/moe/00/used"] > 0
    assert not (tmp_path / "runs/mine/probe.npz").exists(), "the task gives the probe no tokens"
    allowed = cli(tmp_path, "eval", "runs/mine", "--data", "ellipse", "--plugins", "my_task.py")
    assert allowed.returncode == 0, allowed.stderr
    assert json.loads(allowed.stdout)["val/loss"] != summary["val/loss"]
    folded = cli(tmp_path, "fold", "runs/mine", "--out", "folded", "--plugins", "my_task.py")
    assert folded.returncode == 0, folded.stderr
