"""Sweeps: the plan, and real runs under the deepspeed launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from simvq_moe.config.checks import check
from simvq_moe.config.loading import first_difference
from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError
from simvq_moe.runs.folder import is_trained
from simvq_moe.sweeps import execute, machine
from simvq_moe.sweeps.checks import check_runs
from simvq_moe.sweeps.followed import Clock, Followed
from simvq_moe.sweeps.machine import Machine, command
from simvq_moe.sweeps.plan import PlannedRun, origin_of, plan, share
from tests.launching import ROOT, Forked, environment, metrics, run, run_here

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


def test_a_run_is_followed_past_lines_that_only_look_like_its_progress(folder: Path) -> None:
    run = plan([folder / "sweep.yaml"]).runs[0]
    followed = Followed(replace(run, config=replace(run.config, runs_dir=str(folder))), "run")
    followed.log.parent.mkdir(parents=True)
    followed.log.write_text("step size 0.1\nstep\nstep 1/4  25%\nstep one\nstep 0/0\nstep 7 of 9\n")
    assert not followed.read()
    assert (followed.line, followed.share) == ("step 1/4  25%", 0.25)


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
        ("seed: 1", ["unknown key seed.", "Did you mean seeds?"]),
        ("groups: {codes: {config: gone.yaml}}", ["gone.yaml does not exist"]),
        ("groups: {codes: {config: gone.yaml}}", ["groups.codes.config 'gone.yaml'"]),
        ("set: {moe: {experts: x}}", [": set: moe.experts 'x'"]),
        ("set: {seed: 3}", ["set.seed 3", "drop it"]),
        ("groups: {codes: {set: {name: x}}}", ["groups.codes.set.name 'x'"]),
        ("groups: {codes: {arms: {vq: {set: {arm: x}}}}}", ["groups.codes.arms.vq.set.arm 'x'"]),
        ("groups: {codes: {arms: {vq: 3}}}", ["groups.codes.arms.vq 3", "keys and values"]),
        ("groups: {codes: {arms: {a/b: {label: x}}}}", ["groups.codes.arms 'a/b'"]),
        ("groups: {codes: {arms: {'a,b': {label: x}}}}", ["groups.codes.arms 'a,b'"]),
        ("groups: {lr_grid: {config: base.yaml}}", ["does not set groups.lr_grid.arms"]),
        ("groups: {codes: {outcomes: []}}", ["groups.codes.outcomes []"]),
        ("groups: {codes: {primary: {vq: val/mse}}}", ["groups.codes.primary.vq", "simvq"]),
        ("groups: {codes: {primary: {simvq: val/x}}}", ["groups.codes.primary.simvq 'val/x'"]),
        *((f"name: {name}", [f"name {name!r}"]) for name in ("../s", "a/b", "report", ".")),
        ("seeds: []", ["seeds []"]),
        ("groups: {codes: {outcomes: [val/msee]}}", ["outcomes 'val/msee'", "val/mse"]),
        ("predictions: [P8, P99]", ["predictions 'P99'", "P1, P2"]),
        ("seeds: [0, 0]", ["seeds [0, 0]", "twice"]),
        ("seeds: [-1]", ["seeds -1"]),
        ("seeds: 1", ["seeds 1", "list"]),
        ("lr_grid: {seed: 0, factors: [1]}", ["lr_grid.seed 0"]),
        ("lr_grid: {seed: 9, factors: [1, .inf]}", ["lr_grid.factors"]),
        ("lr_grid: {seed: 9, factors: [1, 1]}", ["lr_grid.factors", "twice"]),
    ],
)
def test_a_bad_sweep_is_one_line(folder: Path, extra: str, words: list[str]) -> None:
    (folder / "more.yaml").write_text(extra)
    with pytest.raises(ConfigError) as error:
        plan([folder / "sweep.yaml", folder / "more.yaml"])
    assert all(word in str(error.value) for word in ["more.yaml", *words]), str(error.value)


def test_a_run_that_would_not_start_is_named_with_file_group_and_arm(folder: Path) -> None:
    (folder / "more.yaml").write_text(
        "groups: {codes: {arms: {simvq: {set: {quantizer: {codes: 1}}}}}}"
    )
    files = [folder / "sweep.yaml", folder / "more.yaml"]
    with pytest.raises(ConfigError, match=r"more.yaml: groups.codes.arms.simvq: quantizer.codes 1"):
        check_runs(plan(files).runs, origin_of(files), lambda config, _: check(config), 1)


def test_arms_restrict_the_plan_to_them_and_their_baselines(folder: Path) -> None:
    second = "groups: {more: {question: q, config: base.yaml, baseline: a, outcomes: [val/mse], "
    second += "primary: {b: val/mse}, arms: {a: {label: A}, b: {label: B}, c: {label: C}}}}"
    (folder / "more.yaml").write_text(f"{second}\nseeds: [0, 1]\n")
    files = [folder / "sweep.yaml", folder / "more.yaml"]
    found = plan(files, ["simvq", "more/c"])
    pairs = [("codes", "vq"), ("codes", "simvq"), ("more", "a"), ("more", "c")]
    assert [(r.seed, r.group, r.arm) for r in found.runs] == [
        (s, *p) for s in (0, 1) for p in pairs
    ]
    assert found.spec.groups["more"].primary == {}
    assert {run.group for run in plan(files, ["c"]).runs} == {"more"}
    with pytest.raises(ConfigError, match="--arms 'simqv' is in no group"):
        plan(files, ["simqv"])


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_tasks_of_an_array_share_every_run_once_and_whole_arms_where_asked(
    folder: Path, count: int
) -> None:
    (folder / "more.yaml").write_text("seeds: [0, 1]\n")
    runs = plan([folder / "sweep.yaml", folder / "more.yaml"]).runs
    for whole_arms in (False, True):
        shares = [share(runs, i, count, whole_arms=whole_arms) for i in range(count)]
        assert sorted(run.name for one in shares for run in one) == sorted(run.name for run in runs)
        sizes = [len(one) for one in shares]
        assert max(sizes) - min(sizes) <= (2 if whole_arms else 1)
        if whole_arms:
            arms = [{run.arm for run in one} for one in shares]
            assert sum(len(one) for one in arms) == 3


def test_runs_side_by_side_share_cores_and_gpus() -> None:
    cpus = Machine(ranks=2, parallel=3, cores=16, gpus=())
    assert (cpus.threads, cpus.gpus_of(1)) == (2, [])
    assert Machine(ranks=2, parallel=3, cores=2, gpus=()).threads == 1
    pairs = Machine(ranks=2, parallel=3, cores=16, gpus=("0", "1", "2", "5"))
    assert [pairs.gpus_of(slot) for slot in range(3)] == [["0", "1"], ["2", "5"], ["0", "1"]]
    crowded = Machine(ranks=1, parallel=3, cores=16, gpus=("0",))
    assert [crowded.gpus_of(slot) for slot in range(3)] == [["0"]] * 3


def test_one_rank_needs_no_launcher_and_dealt_gpus_no_number() -> None:
    assert command(Path("a.yaml"), 1)[:3] == [sys.executable, "-m", "simvq_moe"]
    assert "--num_accelerators" in command(Path("a.yaml"), 2)
    assert "--num_accelerators" not in command(Path("a.yaml"), 2, ["2", "5"])


def test_time_left_counts_runs_that_wait_on_those_under_way() -> None:
    clock = Clock()
    assert clock.left([], ["a"], 2) is None
    clock.seen["a"] += [10.0, 20.0]
    assert clock.left([], ["a"], 2) == 15
    # the third begins where the first of two ends; unseen groups are taken for the seen one
    assert clock.left([], ["a", "a", "b"], 2) == 30


HOLDER = """
import fcntl, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
lock = (folder / ".lock").open("w")
fcntl.flock(lock, fcntl.LOCK_EX)
(folder / "launcher.log").write_text("step 2/4  50%\\n")
print("locked", flush=True)
time.sleep(float(sys.argv[3]))
if sys.argv[2] == "finishes":
    (folder / "summary.json").write_text('{"status": "finished"}')
"""


@pytest.mark.parametrize("end", ["finishes", "dies"])
def test_a_run_that_another_process_trains_is_followed_and_gone_on_with_if_it_dies(
    end: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (first, *_) = plan([folder / "sweep.yaml"]).runs
    first.folder.mkdir(parents=True)
    (first.folder / "meta.json").write_text('{"status": "running"}')
    assert not is_trained(first.folder)
    ours = [sys.executable, "-c", HOLDER, str(first.folder), "finishes", "0"]
    started = []
    monkeypatch.setattr(machine, "command", lambda *_: started.append(1) or ours)
    theirs = [*ours[:4], end, "2"]
    with subprocess.Popen(theirs, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        assert is_trained(first.folder)
        pool = execute.Pool(first.folder.parent, Machine(1, 1, 1, ()), [first], lambda: None)
        pool.do([first])
        assert other.wait() == 0
    assert first.status == "finished"
    assert len(started) == (0 if end == "finishes" else 1)
    said = capsys.readouterr().err
    assert "goes on in another process" in said
    assert "failed" not in said


def test_records_that_a_power_cut_has_torn_are_those_of_a_run_that_is_not_done(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (run, *_) = plan([folder / "sweep.yaml"]).runs
    run.folder.mkdir(parents=True)
    for torn in ("", '{"status": "fin', "[]", "7"):
        (run.folder / "summary.json").write_text(torn)
        (run.folder / "meta.json").write_text(torn)
        assert run.status == "pending"


def in_background(*args: str, cwd: Path) -> Forked:
    """A sweep once every run that it does at a time has logged a step."""
    process = Forked(*args, cwd=cwd)
    begun: set[str] = set()
    for line in process.stderr:
        if "step " in line:
            begun.add(line.split()[1])
        if len(begun) == int(args[-1]):
            break
    return process


def assert_equals_a_run_started_alone(run_dir: Path, config: Path, folder: Path) -> None:
    """By a launcher, from the same config."""
    alone = run("train", "--config", str(config), "--runs_dir", "alone", cwd=folder, ranks=2)
    assert alone.returncode == 0, alone.stderr
    (other,) = (file.parent for file in (folder / "alone").rglob("metrics.jsonl"))
    assert metrics(run_dir) == metrics(other)
    for file in (run_dir / "checkpoints").rglob("*.safetensors"):
        same = other / file.relative_to(run_dir)
        assert file.read_bytes() == same.read_bytes(), file.name
    arguments = json.loads((run_dir / "meta.json").read_text())["command"]
    assert arguments.endswith(f"train --config {config.relative_to(folder)}")


@pytest.mark.distributed
def test_a_sweep_runs_reports_failures_and_skips_what_is_finished(folder: Path) -> None:
    command = ("sweep", "--config", "sweep.yaml", "--ranks", "2", "--arms", "broken")
    first = run_here(*command, cwd=folder)
    assert first.returncode == 1, first.stderr
    root = folder / "runs" / "small"
    statuses = {
        arm["name"]: arm["runs"][0]["status"]
        for arm in json.loads((root / "sweep.json").read_text())["groups"][0]["arms"]
    }
    assert statuses == {"vq": "finished", "broken": "failed"}
    meta = json.loads((root / "codes" / "vq" / "seed0" / "meta.json").read_text())
    assert meta["world_size"] == 2
    assert "[2/2] codes/broken/seed0 failed" in first.stderr
    assert "last good" in (root / "codes" / "broken" / "seed0" / "launcher.log").read_text()
    report = json.loads((root / "report" / "report.json").read_text())
    arms = {arm["name"]: arm for arm in report["groups"][0]["arms"]}
    run_dir = root / "codes" / "vq" / "seed0"
    assert_equals_a_run_started_alone(run_dir, root / "configs" / "codes-vq-seed0.yaml", folder)
    final = metrics(run_dir)[-1]
    assert arms["vq"]["values"]["val/mse"] == [pytest.approx(final["val/mse"])]
    assert arms["broken"]["status"] == ["failed"]
    again = run_here(*command, cwd=folder)
    assert again.returncode == 1
    assert "1 of 2 runs are finished and skipped" in again.stderr
    assert "[1/2]" not in again.stderr


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "number"), [("2", signal.SIGINT), ("1", signal.SIGTERM)])
def test_an_interrupted_sweep_saves_every_run_under_way(
    folder: Path, ranks: str, number: signal.Signals
) -> None:
    (folder / "long.yaml").write_text("set: {train: {steps: 900, save_every: 900}}\nname: long\n")
    files = ("--config", "sweep.yaml", "--config", "long.yaml", "--arms", "vq,simvq")
    parallel = "1" if ranks == "2" else "2"
    process = in_background("sweep", *files, "--ranks", ranks, "--parallel", parallel, cwd=folder)
    os.kill(process.pid, number)
    process.communicate(timeout=300)
    assert process.returncode == 130
    for arm in ("vq", "simvq")[: int(parallel)]:
        run_dir = folder / "runs" / "long" / "codes" / arm / "seed0"
        assert json.loads((run_dir / "meta.json").read_text())["status"] == "interrupted"
        stopped_at = int((run_dir / "checkpoints" / "latest").read_text())
        assert 0 < stopped_at < 900


@pytest.mark.distributed
def test_a_killed_run_is_failed_and_the_others_go_on(folder: Path) -> None:
    (folder / "long.yaml").write_text("set: {train: {steps: 300}}\nname: long\n")
    files = ("--config", "sweep.yaml", "--config", "long.yaml", "--arms", "simvq")
    process = in_background("sweep", *files, "--parallel", "2", cwd=folder)
    root = folder / "runs" / "long" / "codes"
    log = str(root / "vq" / "seed0" / "launcher.log")
    training = next(
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any(file.path == log for file in child.open_files())
    )
    training.kill()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    statuses = [
        json.loads((root / arm / "seed0" / "meta.json").read_text())["status"]
        for arm in ("vq", "simvq")
    ]
    assert statuses == ["failed", "finished"]
    assert "killed by signal 9" in (root / "vq" / "seed0" / "meta.json").read_text()
    content = json.loads((folder / "runs" / "long" / "sweep.json").read_text())
    assert content["command"].endswith("--arms simvq --ranks 1 --parallel 2")
    assert [arm["name"] for arm in content["groups"][0]["arms"]] == ["vq", "simvq"]
    assert "SimVQ" in out


@pytest.mark.distributed
def test_a_job_array_does_its_runs_in_tasks_and_the_last_one_reports(folder: Path) -> None:
    srun = folder / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/usr/bin/env bash\nwhile [[ "$1" == --* ]]; do shift 2; done\nexec "$@"\n')
    srun.chmod(0o755)
    ours = environment()
    ours |= {"PATH": f"{srun.parent}:{ours['PATH']}", "SLURM_SUBMIT_DIR": str(folder)}
    ours |= {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3"}
    command = ["bash", str(ROOT / "launch" / "slurm_sweep.sbatch"), "--config", "sweep.yaml"]
    command += ["--arms", "simvq"]
    root = folder / "runs" / "small"
    for task, done in ((3, ["vq"]), (4, ["vq", "simvq"])):
        environ = ours | {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": str(70 + task)}
        found = subprocess.run(
            command, env=environ, capture_output=True, text=True, check=False, timeout=300
        )
        assert found.returncode == 0, found.stderr
        finished = [
            arm
            for arm in ("vq", "simvq")
            if (root / "codes" / arm / "seed0" / "summary.json").is_file()
        ]
        assert finished == done
        assert (root / "report" / "report.json").is_file() == (task == 4)
    assert "the other tasks' runs go on" not in found.stderr


@pytest.mark.parametrize("torn", [b"", b'{"status": "fin', bytes(20)])
def test_a_record_that_a_power_cut_has_torn_says_nothing_of_a_run(
    tmp_path: Path, torn: bytes
) -> None:
    run_of_plan = PlannedRun("codes", "vq", 0, Config(name="sweep/run", runs_dir=str(tmp_path)))
    run_of_plan.folder.mkdir(parents=True)
    assert run_of_plan.status == "pending"
    meta, summary = (run_of_plan.folder / name for name in ("meta.json", "summary.json"))
    meta.write_text('{"status": "interrupted"}')
    summary.write_bytes(torn)
    assert run_of_plan.status == "interrupted"
    meta.write_bytes(torn)
    assert run_of_plan.status == "pending"
    summary.write_text("{}")
    assert run_of_plan.status == "finished"
