"""The machine that runs of a sweep share: its cores and GPUs, and processes that start and stop."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import psutil

from simvq_moe.errors import ConfigError

SECONDS_TO_SAVE = 60.0
"""Grace of an interrupted run, after which it is killed."""


@dataclass(frozen=True)
class Machine:
    """How runs share this machine."""

    ranks: int
    """Processes of a run."""
    parallel: int
    """Runs at a time."""
    cores: int
    gpus: tuple[str, ...]
    """Devices as CUDA_VISIBLE_DEVICES names them; empty: CPUs only."""

    @property
    def threads(self) -> int:
        """Threads of a process."""
        return max(1, self.cores // (self.ranks * self.parallel))

    def gpus_of(self, slot: int) -> list[str]:
        """The devices of the run in a slot: none twice in a run, and shared by as few as can be.

        Args:
            slot: 0 to parallel - 1.
        """
        first = slot * self.ranks
        return [
            self.gpus[(first + i) % len(self.gpus)] for i in range(self.ranks if self.gpus else 0)
        ]


def this_machine(ranks: int, parallel: int) -> Machine:
    """What there is here.

    Raises:
        ConfigError: less than one rank or run, or more ranks than GPUs.
    """
    import torch

    for name, value in (("ranks", ranks), ("parallel", parallel)):
        if value < 1:
            raise ConfigError(f"--{name} {value} must be at least 1")
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(64)))
    count = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    if 0 < count < ranks:
        raise ConfigError(f"--ranks {ranks} > {count} GPUs: lower it, or set DS_ACCELERATOR=cpu")
    gpus = tuple(named.split(",")[:count])
    return Machine(ranks, parallel, len(os.sched_getaffinity(0)), gpus)


def command(config: Path, ranks: int, gpus: Sequence[str] = ()) -> list[str]:
    """The command line of one run of a config on this machine.

    One rank needs no launcher, which takes seconds to start.
    """
    module = ["simvq_moe", *train_arguments(config)]
    if ranks == 1:
        return [sys.executable, "-m", *module]
    return launch_command(ranks, gpus, module)


def train_arguments(config: Path) -> list[str]:
    """Arguments of simvq-moe, to train what a file says."""
    return ["train", "--config", str(config)]


def launch_command(ranks: int, gpus: Sequence[str], module: Sequence[str]) -> list[str]:
    """The command line of the deepspeed launcher for some ranks of a module on this machine.

    It takes the devices from CUDA_VISIBLE_DEVICES unless it is told their number.
    """
    number = () if gpus else ("--num_accelerators", str(ranks))
    return [launcher(), "-q", *number, "--master_port", str(free_port()), "--module", *module]


def launcher() -> str:
    """Path of the deepspeed launcher that belongs to this Python, or else of the first on PATH."""
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        raise ConfigError("the deepspeed launcher is not on PATH: pip install deepspeed")
    return found


def free_port() -> int:
    """A port of this machine that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@runtime_checkable
class Started(Protocol):
    """A run's process, or the parent of its ranks."""

    @property
    def pid(self) -> int:
        """Its number, and that of its group of processes."""
        ...

    def poll(self) -> int | None:
        """The exit code; None: it goes on."""
        ...

    def wait(self) -> int:
        """The exit code, once there is one; below 0: minus the signal that has ended it."""
        ...


Starter = Callable[[Path, Path, Machine, Sequence[str]], Started]
"""Starts the run of a config on some GPUs of a machine; its output is added to a log, the second.
"""


def launched(config: Path, log: Path, machine: Machine, gpus: Sequence[str]) -> Started:
    """The run in processes of its own, by the launcher if it has several ranks."""
    with log.open("a") as file:
        return subprocess.Popen(
            command(config, machine.ranks, gpus),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(machine, gpus),
            # its own group, because the launcher leaves the ranks behind when it alone is killed
            start_new_session=True,
        )


def environment(machine: Machine, gpus: Sequence[str]) -> dict[str, str]:
    """The runs and their ranks share this machine's cores and GPUs."""
    accelerator = "cuda" if machine.gpus else "cpu"
    ours = {"OMP_NUM_THREADS": str(machine.threads), "DS_ACCELERATOR": accelerator}
    dealt = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    return ours | os.environ | dealt


def stop(processes: Sequence[Started]) -> None:
    """Ask every process of these runs to save and stop; kill those that do not."""
    groups = {process.pid for process in processes}
    members = [p for p in psutil.process_iter() if _group(p) in groups]  # a rank may outlive others
    for number in (signal.SIGINT, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        until = time.monotonic() + SECONDS_TO_SAVE
        while any(_is_alive(p) for p in members) and time.monotonic() < until:
            time.sleep(0.1)
    for process in processes:
        process.wait()


def _group(process: psutil.Process) -> int | None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        return os.getpgid(process.pid)
    return None


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
