"""Start the program as a user does, in processes of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.multiprocessing.spawn import start_processes

from simvq_moe.cli import main
from simvq_moe.forked_run import IMPORTS, ForkedRun
from simvq_moe.sweeps.machine import free_port

ROOT = Path(__file__).parent.parent
TIMINGS = ("time", "speed/", "memory/")
"""Prefixes of metrics that no two runs share."""
PLACE = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""Variables of a rank. Trainers of other libraries leave theirs behind in the process of the tests;
those that a test starts are no part of that launch."""


def environment() -> dict[str, str]:
    """One thread a process; the package from this checkout, from any working directory."""
    ours = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "",  # compiled once, not at every start
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return {name: v for name, v in os.environ.items() if name not in PLACE} | ours


def start(*args: str, cwd: Path, ranks: int = 1) -> subprocess.Popen[str]:
    """`simvq-moe ...` in cwd, by torchrun for more than one rank."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return start_command([*launch, "-m", "simvq_moe", *args], cwd)


def start_local(*args: str, cwd: Path, ranks: int = 2) -> subprocess.Popen[str]:
    """`launch/local.sh RANKS ...` in cwd: by the deepspeed launcher, without the installation."""
    deepspeed = ["deepspeed", "-q", "--no_local_rank", "--num_accelerators", str(ranks)]
    command = [*deepspeed, "--master_port", str(free_port()), "--module", "simvq_moe", *args]
    script = f'source {ROOT}/launch/environment.sh && supervised "$@"'
    return start_command(["bash", "-c", script, "local", *command], cwd)


def start_command(command: Sequence[str], cwd: Path, **variables: str) -> subprocess.Popen[str]:
    """Any command in cwd, in a session of its own."""
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(*args: str, cwd: Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """`start`, to the end."""
    process = start(*args, cwd=cwd, ranks=ranks)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class Forked:
    """`simvq-moe ...` with the interface of `subprocess.Popen`, forked as a sweep does it: by no
    launcher, and without the seconds that Python takes to start in each process. For tests of what
    a run does, not of how it is launched.

    Args:
        args: of simvq-moe.
        cwd: where it works.
        ranks: its processes, which one more waits for where there are several.
        variables: of its environment, beside those of all that tests start.
    """

    def __init__(
        self, *args: str, cwd: Path, ranks: int = 1, variables: Mapping[str, str] | None = None
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            pipes = Path(folder, "out"), Path(folder, "err")  # no limit on files holds for them
            for pipe in pipes:
                os.mkfifo(pipe)
            ends = [os.open(pipe, os.O_RDONLY | os.O_NONBLOCK) for pipe in pipes]
            out, err = pipes
            self._run = ForkedRun(args, err, ranks, environment() | dict(variables or {}), out, cwd)
            self.pid = self._run.pid
            while self.poll() is None and _standard_error(self.pid) != str(err):
                time.sleep(0.001)
        for end in ends:
            os.set_blocking(end, True)
        self.stdout, self.stderr = (os.fdopen(end) for end in ends)

    def poll(self) -> int | None:
        return self._run.poll()

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return self._run.wait()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has written, once it has ended."""
        with self.stdout, self.stderr, ThreadPoolExecutor(2) as pool:
            written = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            out, err = (found.result(timeout) for found in written)
        self._run.wait()
        return out, err


def _standard_error(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/fd/2")
    except OSError:  # it has ended
        return None


def run_forked(*args: str, cwd: Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """`Forked`, to the end."""
    process = Forked(*args, cwd=cwd, ranks=ranks)
    out, err = process.communicate(timeout=300)
    assert process.returncode is not None
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def on_ranks(work: Callable[..., None], *args: Any, ranks: int = 2) -> None:
    """`work(rank, *args)` in a process of each rank, which is forked as `Forked` is."""
    get_context("forkserver").set_forkserver_preload([IMPORTS])
    start_processes(work, args, nprocs=ranks, start_method="forkserver")


def run_here(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`run` in this process: for a command that itself starts those that train."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        for name in PLACE:
            patch.delenv(name, raising=False)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(args)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without timings."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMINGS)} for line in lines]


def start_tasks(*args: str, cwd: Path, ranks: int = 2) -> list[Forked]:
    """`srun --ntasks RANKS python -m simvq_moe ...` in cwd: one process a rank, and no launcher."""
    port = free_port()
    step = {"SLURM_STEP_NUM_TASKS": str(ranks), "SLURM_STEP_NODELIST": "localhost"}
    step |= {"MASTER_PORT": str(port)}
    return [
        Forked(*args, cwd=cwd, variables=step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
        for i in range(ranks)
    ]


def rank_of(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of this rank, once the launcher has started it."""
    while launcher.poll() is None:
        for child in psutil.Process(launcher.pid).children(recursive=True):
            try:
                if child.environ().get("RANK") == str(rank):
                    return child
            except psutil.Error:
                continue
        time.sleep(0.1)
    raise AssertionError(f"the launcher ended with {launcher.returncode}")


def wait_until(process: subprocess.Popen[str] | Forked, there: Callable[[], bool]) -> None:
    """Wait for something that a process does before it ends."""
    while not there():
        assert process.poll() is None, "the process ended before: raise train.steps"
        time.sleep(0.005)


def stop_where(process: psutil.Process, there: Callable[[], bool]) -> None:
    """Stop a process at a moment when something holds, and still does once it has stopped."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if there():
            process.suspend()
            while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                time.sleep(0.001)
            if there():
                return
            process.resume()
        time.sleep(0.005)
    raise AssertionError("the process ended before: raise train.steps")
