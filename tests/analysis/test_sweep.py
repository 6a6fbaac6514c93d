"""Sweeps: the plan, and real runs under the deepspeed launcher."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from simvq_moe.analysis.sweep import plan
from simvq_moe.merging import ConfigError, first_difference
from tests.launching import metrics, run, start

SWEEP = """
name: small
title: Small
seeds: [0]
set: {train: {steps: 4, batch_size: 8, log_every: 2}, data: {crops: 64, held_out_crops: 18}}
groups:
  codes:
    question: Does it run?
    config: base.yaml
    baseline: vq
    outcomes: [val/mse]
    set: {train: {save_every: 2}}
    arms:
      vq: {label: VQ, set: {quantizer: {kind: vq}}}
      simvq: {label: SimVQ}
      broken: {label: broken, control: true, set: {optimizer: {lr: 1e30, warmup_steps: 0}}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("quantizer: {codes: 16}\n")
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return tmp_path


def test_a_plan_has_every_arm_with_every_seed_and_only_their_own_changes(folder: Path) -> None:
    (folder / "more.yaml").write_text("seeds: [3, 4]\n")
    runs = plan([folder / "sweep.yaml", folder / "more.yaml"]).runs
    assert [(r.arm, r.seed) for r in runs] == [
        (arm, seed) for seed in (3, 4) for arm in ("vq", "simvq", "broken")
    ]
    assert all(r.config.quantizer.codes == 16 and r.config.train.save_every == 2 for r in runs)
    same = {"name": runs[1].config.name, "arm": "simvq"}
    assert first_difference(runs[1].config, replace(runs[0].config, **same)) == (
        "quantizer.kind was 'simvq' and is now 'vq'"
    )


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("groups: {codes: {baseline: nope}}", ["groups.codes.baseline 'nope'", "vq, simvq"]),
        ("groups: {codes: {arms: {vq: {set: {moe: {exprets: 3}}}}}}", ["moe.exprets", "arms.vq"]),
        ("sedes: [1]", ["unknown key sedes", "Did you mean seeds"]),
        ("groups: {codes: {config: gone.yaml}}", ["gone.yaml does not exist"]),
    ],
)
def test_a_bad_sweep_is_one_line(folder: Path, extra: str, words: list[str]) -> None:
    (folder / "more.yaml").write_text(extra)
    with pytest.raises(ConfigError) as error:
        plan([folder / "sweep.yaml", folder / "more.yaml"])
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.distributed
def test_a_sweep_runs_reports_failures_and_skips_what_is_finished(folder: Path) -> None:
    command = ("sweep", "--config", "sweep.yaml", "--ranks", "2")
    first = run(*command, cwd=folder)
    assert first.returncode == 1, first.stderr
    root = folder / "runs" / "small"
    statuses = {
        arm["name"]: arm["runs"][0]["status"]
        for arm in json.loads((root / "sweep.json").read_text())["groups"][0]["arms"]
    }
    assert statuses == {"vq": "finished", "simvq": "finished", "broken": "failed"}
    meta = json.loads((root / "codes" / "simvq" / "seed0" / "meta.json").read_text())
    assert meta["world_size"] == 2
    assert "[3/3] codes/broken/seed0 failed" in first.stderr
    assert "last good" in (root / "codes" / "broken" / "seed0" / "launcher.log").read_text()
    report = json.loads((root / "report" / "report.json").read_text())
    arms = {arm["name"]: arm for arm in report["groups"][0]["arms"]}
    final = metrics(root / "codes" / "simvq" / "seed0")[-1]
    assert arms["simvq"]["values"]["val/mse"] == [pytest.approx(final["val/mse"])]
    assert arms["broken"]["status"] == ["failed"]
    again = run(*command, cwd=folder)
    assert again.returncode == 1
    assert "2 of 3 runs are finished and skipped" in again.stderr
    assert "[1/3]" not in again.stderr


@pytest.mark.distributed
def test_an_interrupted_sweep_saves_its_run_and_goes_on_from_there(folder: Path) -> None:
    (folder / "long.yaml").write_text("set: {train: {steps: 600, save_every: 600}}\nname: long\n")
    command = ("sweep", "--config", "sweep.yaml", "--config", "long.yaml", "--ranks", "2")
    process = start(*command, cwd=folder)
    assert process.stderr is not None
    for line in process.stderr:
        if "step " in line:
            break
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    run_dir = folder / "runs" / "long" / "codes" / "vq" / "seed0"
    assert json.loads((run_dir / "meta.json").read_text())["status"] == "interrupted"
    stopped_at = int((run_dir / "checkpoints" / "latest").read_text())
    assert 0 < stopped_at < 600
