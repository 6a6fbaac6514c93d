"""The scripts of launch/ hand to launchers what these need. Stand-ins for the launchers, which
belong to others, note it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.launching import ROOT

NOTED = '#!/bin/sh\necho "devices=$CUDA_VISIBLE_DEVICES $*" >> "$NOTES"\n'
SRUN = f"""#!{sys.executable}
# srun of SLURM: with --kill-on-bad-exit=1 it ends all tasks with SIGTERM once one has a code that
# is not 0, a task that a signal has ended outweighs every exit code, and all are handed SIGTERM
import signal, subprocess, sys, time

options = [word for word in sys.argv[1:] if word.startswith("-")]
command = sys.argv[1 + next(i for i, w in enumerate(sys.argv[1:]) if not w.startswith("-")):]
print(*options, file=sys.stderr, flush=True)
tasks = [subprocess.Popen([*command, str(i)]) for i in range(2)]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
left, codes = list(tasks), []
while left:
    for task in [task for task in left if task.poll() is not None]:
        left.remove(task)
        codes.append(task.returncode)
        if task.returncode and "--kill-on-bad-exit=1" in options:
            for other in left:
                other.terminate()
    time.sleep(0.01)
sys.exit(128 - min(codes) if min(codes) < 0 else max(codes))
"""
TASK = f"""#!{sys.executable}
# a rank: it saves for a while after SIGTERM, and the first one is ready before the second
import signal, sys, time

def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Python's end does
    time.sleep(0.2 + int(sys.argv[-1]))
    sys.exit(130)

signal.signal(signal.SIGTERM, save)
print("ready", file=sys.stderr, flush=True)
time.sleep(60)
"""


@pytest.fixture
def launch(tmp_path: Path) -> Path:
    """A copy of launch/ that installs nothing."""
    folder = tmp_path / "launch"
    shutil.copytree(ROOT / "launch", folder)
    with (folder / "environment.sh").open("a") as script:
        script.write("environment() { :; }\n")
    return folder


def tool(folder: Path, name: str, text: str) -> None:
    path = folder / "tools" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def variables(folder: Path, **more: str) -> dict[str, str]:
    names = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    path = f"{folder / 'tools'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | {"NOTES": str(folder / "notes"), "PATH": path} | more


def local(folder: Path, ranks: str, **more: str) -> subprocess.CompletedProcess[str]:
    tool(folder.parent, "deepspeed", NOTED)
    return subprocess.run(
        ["bash", str(folder / "local.sh"), ranks, "--config", "x.yaml"],
        env=variables(folder.parent, **more),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("named", "devices", "number"),
    [
        ({}, "", "--num_accelerators 2 "),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, "2,3", ""),
        ({"CUDA_VISIBLE_DEVICES": "5,6,7"}, "5,6", ""),
        ({"CUDA_VISIBLE_DEVICES": "2", "DS_ACCELERATOR": "cpu"}, "2", "--num_accelerators 2 "),
    ],
)
def test_local_takes_the_gpus_that_are_named(
    launch: Path, named: dict[str, str], devices: str, number: str
) -> None:
    done = local(launch, "2", **named)
    assert done.returncode == 0, done.stderr
    said = (launch.parent / "notes").read_text()
    assert said.startswith(f"devices={devices} -q --no_local_rank {number}--master_port")
    assert said.endswith("--module simvq_moe train --config x.yaml\n")


def test_local_refuses_more_processes_than_gpus_that_are_named(launch: Path) -> None:
    done = local(launch, "3", CUDA_VISIBLE_DEVICES="2,3")
    assert done.returncode == 2
    assert "CUDA_VISIBLE_DEVICES 2,3 names 2 GPUs < 3" in done.stderr


def test_local_refuses_gpus_that_are_named_otherwise_than_by_number(launch: Path) -> None:
    done = local(launch, "1", CUDA_VISIBLE_DEVICES="GPU-8932f937-d72c-4106-c12f-20bd9faed9f6")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "CUDA_VISIBLE_DEVICES GPU-8932f937-d72c-4106-c12f-20bd9faed9f6: " in line
    assert "nvidia-smi -L" in line


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (4, 2)])
def test_the_quickstart_starts_with_any_number_of_gpus(launch: Path, gpus: int, ranks: int) -> None:
    tool(launch.parent, "simvq-moe", NOTED)
    tool(launch.parent, "python", f"#!/bin/sh\necho {gpus}\n")
    script = ["bash", str(launch / "quickstart.sh")]
    done = subprocess.run(script, env=variables(launch.parent), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (launch.parent / "notes").read_text().endswith(f"--ranks {ranks} --launcher\n")


@pytest.mark.parametrize(("there", "said"), [(False, "sees no GPU"), (True, "check.json exists")])
def test_a_check_of_the_gpu_is_refused_before_anything_is_measured(
    launch: Path, there: bool, said: str
) -> None:
    out = launch.parent / "out"
    if there:
        out.mkdir()
        (out / "check.json").touch()
    tool(launch.parent, "python", f"#!/bin/sh\nexit {int(not there)}\n")
    script = ["bash", str(launch / "gpu_check.sh"), str(out)]
    done = subprocess.run(
        script, env=variables(launch.parent), capture_output=True, check=False, text=True
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert out.exists() == there


def test_a_slurm_job_is_queued_again_whichever_task_saves_first(launch: Path) -> None:
    folder = launch.parent
    tool(folder, "srun", SRUN)
    tool(folder, "python", TASK)
    tool(folder, "scontrol", NOTED)
    # without the project's own .venv in front
    script = (launch / "slurm.sbatch").read_text().replace("$PWD/.venv/bin:", "")
    (folder / "job.sh").write_text(script)
    told = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    with subprocess.Popen(
        ["bash", str(folder / "job.sh")],
        env=variables(folder, **told),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as job:
        assert job.stderr is not None
        lines: list[str] = []
        while "".join(lines).count("ready") < 2:
            lines.append(job.stderr.readline())
            assert lines[-1], lines
        (step,) = psutil.Process(job.pid).children()
        step.terminate()  # as --signal TERM@120 does, which does not reach the script
        assert job.wait(timeout=30) == 130
    assert "--cpus-per-task=8" in "".join(lines)
    assert (folder / "notes").read_text().endswith("requeue 7\n")
