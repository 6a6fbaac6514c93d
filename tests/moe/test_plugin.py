"""A router of a user's own: one file, then it trains on any number of ranks, folds, is swept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.launching import ROOT, run_forked
from tests.quantizers.test_plugin import cli

SMALL = {
    "task": "language_model",
    "data": {"source": "corpus", "vocabulary": 300, "context": 16},
    "language_model": {"width": 16, "heads": 2, "layers": 1},
    "moe": {"experts": 4, "top_k": 2, "hidden": 8},
    "train": {"steps": 2, "batch_size": 4, "probe_tokens": 16},
}
MINE = {"router": {"kind": "direction", "sharpness": 2.0, "map": {"kind": "linear"}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("my_router.py", "my_parts.py"):
        shutil.copy(Path(__file__).parent / name, tmp_path)
    (tmp_path / "corpus").mkdir()
    shutil.copy(ROOT / "simvq_moe" / "core" / "bank.py", tmp_path / "corpus")
    return tmp_path


def write(file: Path, content: object) -> None:
    file.write_text(yaml.safe_dump(content))


@pytest.mark.distributed
def test_a_router_of_one_file_trains_on_two_ranks_is_named_and_folds(folder: Path) -> None:
    mine = SMALL | {"plugins": ["my_router.py"], "moe": SMALL["moe"] | MINE}
    write(folder / "mine.yaml", mine)
    done = run_forked("train", "--config", "mine.yaml", "--name", "mine", cwd=folder, ranks=2)
    assert done.returncode == 0, done.stderr
    meta = json.loads((folder / "runs/mine/meta.json").read_text())
    assert meta["plugins"] == ["my_router.py"]
    assert "my_router.py" in done.stderr
    assert "val/moe/00/entropy" in json.loads((folder / "runs/mine/summary.json").read_text())
    allowed = ("--plugins", "my_router.py")
    folded = cli(folder, "fold", "runs/mine", "--out", "folded", *allowed)
    assert folded.returncode == 0, folded.stderr
    text = cli(folder, "generate", "folded", "--tokens", "2", *allowed)
    assert text.returncode == 0, text.stderr


def test_a_balance_and_an_expert_of_one_file_have_flags_costs_and_records_like_ours(
    folder: Path,
) -> None:
    parts = {"balance": {"kind": "importance"}, "expert": {"kind": "squared_relu"}}
    write(folder / "mine.yaml", SMALL | {"plugins": ["my_parts.py"], "moe": SMALL["moe"] | parts})
    train = ("train", "--config", "mine.yaml", "--name", "mine")
    wrong = cli(folder, *train, "--moe.balance.weight", "-1")
    assert wrong.returncode == 2
    assert "moe.balance.weight -1.0 < 0: use at least 0" in wrong.stderr
    dry = cli(folder, *train, "--dry-run")
    assert json.loads(dry.stdout)["per_rank"]["activation_bytes"] > 0
    done = cli(folder, *train, "--moe.balance.weight", "0.5")
    assert done.returncode == 0, done.stderr
    line = json.loads((folder / "runs/mine/metrics.jsonl").read_text().splitlines()[-1])
    parts_of_loss = line["train/cross_entropy"] + 0.5 * line["train/balance_loss"]
    assert line["train/balance_loss"] > 0
    assert line["train/loss"] == pytest.approx(parts_of_loss, rel=1e-5)


def test_an_arm_may_have_a_router_of_a_plug_in(folder: Path) -> None:
    write(folder / "base.yaml", SMALL)
    own = {"plugins": ["my_router.py"], "moe": MINE}
    arms = {"base": {"label": "plain"}, "mine": {"label": "mine", "set": own}}
    group = {"question": "?", "config": "base.yaml", "baseline": "base", "arms": arms}
    group["outcomes"] = ["val/bits_per_byte"]
    write(folder / "s.yaml", {"name": "s", "title": "s", "seeds": [0], "groups": {"g": group}})
    done = cli(folder, "sweep", "--config", "s.yaml")
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "runs/s/report/report.json").read_text())
    assert [arm["name"] for arm in report["groups"][0]["arms"]] == ["base", "mine"]


def test_a_plug_in_of_an_installed_package_needs_no_word_in_a_config(folder: Path) -> None:
    # what pip writes of a package
    installed = folder / "direction-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: direction\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[simvq_moe.plugins]\ndirection = my_router\n")
    write(folder / "mine.yaml", SMALL | {"moe": SMALL["moe"] | MINE})
    dry = cli(folder, "train", "--config", "mine.yaml", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    (folder / "my_router.py").write_text("1 / 0")
    broken = cli(folder, "train", "--config", "mine.yaml", "--dry-run")
    assert broken.returncode == 2
    assert "the installed plug-in 'my_router' can't be loaded: ZeroDivisionError" in broken.stderr
