"""A quantizer of a user's own: one file, then it trains, is measured and refused like ours."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from tests.launching import run_forked

SMALL = (
    *("--train.steps", "2", "--train.batch_size", "4", "--data.crops", "16", "--name", "mine"),
    *("--data.held_out_crops", "18", "--data.image_size", "8", "--image_tokenizer.hidden", "4"),
    *("--quantizer.factor", "0.5", "--quantizer.codes", "8", "--quantizer.width", "4"),
)


def cli(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return run_forked(*args, cwd=folder)


def test_a_quantizer_of_one_file_has_flags_checks_and_records_like_ours(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parent / "my_quantizer.py", tmp_path)
    config = "plugins: [my_quantizer.py]\nquantizer: {kind: shrunk_vq}\n"
    (tmp_path / "mine.yaml").write_text(config)
    train = ("train", "--config", "mine.yaml", *SMALL)
    wrong = cli(tmp_path, *train, "--quantizer.factor", "20")
    assert wrong.returncode == 2, wrong.stderr
    assert "quantizer.factor 20.0 > 10: use at most that" in wrong.stderr
    done = cli(tmp_path, *train)
    assert done.returncode == 0, done.stderr
    assert "val/codes/used" in json.loads((tmp_path / "runs/mine/summary.json").read_text())
    # a folder of a stranger runs no code by itself
    refused = cli(tmp_path, "eval", "runs/mine")
    assert refused.returncode == 2
    assert "names the plug-in 'my_quantizer.py', which is code" in refused.stderr
    allowed = cli(tmp_path, "eval", "runs/mine", "--plugins", "my_quantizer.py")
    assert allowed.returncode == 0, allowed.stderr
    assert "codes/used" in allowed.stdout
    folded = cli(tmp_path, *["fold", "runs/mine", "--out", "f", "--plugins", "my_quantizer.py"])
    assert folded.returncode == 2
    assert "runs/mine has no shared map: there is nothing to fold" in folded.stderr
