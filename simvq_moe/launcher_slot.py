"""Runs of several ranks under one deepspeed launcher for each slot of a sweep.

The launcher and the ranks that it starts need seconds to import torch and DeepSpeed. Here they do
so once a slot: each rank imports all that a run needs, then forks a process for one run after
another, which begins in the state of a fresh rank (see `forked_run`). The sweep tells the ranks
over a socket which run is next, and reads from it how each ended. A rank that is lost ends its run
and its slot alone; ranks whose sweep is gone end once their run has.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Client, Connection
from pathlib import Path

from simvq_moe.forked_run import IMPORTS, SECONDS_TO_END, become, command
from simvq_moe.sweeps.machine import (
    Machine,
    environment,
    free_port,
    launch_command,
    train_arguments,
)

ADDRESS = "SIMVQ_MOE_SLOT"
"""Variable that tells the ranks where their sweep is."""
SECONDS_BETWEEN_LOOKS = 0.02
LONGEST_FOLDER = 60
"""Characters of a temporary folder whose sockets have addresses that the system takes."""
LOST = 1
"""Exit code of a run whose launcher, or the process of a rank that it was forked from, is gone."""


@dataclass(frozen=True)
class Order:
    """The next run, to one rank."""

    arguments: tuple[str, ...]
    """Arguments of simvq-moe."""
    log: str
    """File that the output is added to."""
    port: int
    """The port at which the ranks of this run meet."""
    group: int
    """Group of processes that this rank joins; 0: it leads one of its own."""


class Slot:
    """The deepspeed launcher and its ranks, which wait for runs.

    Args:
        machine: how many ranks, on what.
        log: file that the launcher's own output is added to.
    """

    def __init__(self, machine: Machine, log: Path) -> None:
        self.size = machine.ranks
        launch = launch_command(self.size, (), [__name__])
        short = len(tempfile.gettempdir()) < LONGEST_FOLDER
        folder = tempfile.mkdtemp(prefix="simvq_moe_slot_", dir=None if short else "/tmp")
        address = f"{folder}/socket"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(self.size)
        self._listener.setblocking(False)
        self._come: list[Connection] = []
        self._ranks: dict[int, Connection] = {}
        with log.open("a") as file:
            self._launcher = subprocess.Popen(
                launch,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(machine, ()) | {ADDRESS: address},
                start_new_session=True,
            )
        self.pid = self._launcher.pid
        self.run: SlotRun | None = None
        self.is_lost = False

    def ranks(self) -> list[Connection] | None:
        """The ranks in their order; None: some import still.

        Raises:
            EOFError: the launcher or a rank is gone.
        """
        if self._launcher.poll() is not None:
            raise EOFError
        with contextlib.suppress(BlockingIOError):
            while len(self._come) < self.size:
                self._come.append(Connection(self._listener.accept()[0].detach()))
        for one in self._come:
            if one not in self._ranks.values() and one.poll():
                self._ranks[one.recv()] = one
        return [self._ranks[i] for i in range(self.size)] if len(self._ranks) == self.size else None

    def is_free(self) -> bool:
        """Whether the next run can have it: its run has ended, and it has not."""
        return not self.is_lost and (self.run is None or self.run.poll() is not None)

    def close(self) -> None:
        """End the ranks and their launcher."""
        for one in (*self._come, self._listener):
            one.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._launcher.wait(SECONDS_TO_END)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._launcher.wait()


class SlotRun:
    """A run in a slot, as `machine.Started` has it."""

    def __init__(self, slot: Slot, arguments: Sequence[str], log: Path) -> None:
        self._slot, self._log, self._arguments = slot, log, tuple(arguments)
        self._group = 0
        self._going: dict[int, Connection] = {}
        self._failed = 0
        self._kill_at = float("inf")
        self._code: int | None = None
        slot.run = self

    @property
    def pid(self) -> int:
        return self._group or self._slot.pid

    def poll(self) -> int | None:
        if self._code is None:
            try:
                self._code = self._look()
            except (EOFError, OSError):
                self._tell(signal.SIGKILL)
                self._slot.is_lost, self._code = True, LOST
        return self._code

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return code

    def _look(self) -> int | None:
        ranks = self._slot.ranks()
        if ranks is None:
            return None
        if not self._group:
            self._begin(ranks)
        for rank, one in list(self._going.items()):
            if not one.poll():
                continue
            code = one.recv()
            del self._going[rank]
            if code and not self._failed:
                self._failed = code
                self._kill_at = time.monotonic() + SECONDS_TO_END
                self._tell(signal.SIGTERM)
        if time.monotonic() > self._kill_at:
            self._tell(signal.SIGKILL)
        return None if self._going else self._failed

    def _begin(self, ranks: Sequence[Connection]) -> None:
        port = free_port()
        for rank, one in enumerate(ranks):
            one.send(Order(self._arguments, str(self._log), port, self._group))
            pid = one.recv()
            self._group = self._group or pid
            self._going[rank] = one

    def _tell(self, number: int) -> None:
        if self._group:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._group, number)


class Slots:
    """Starts the runs of a sweep, each in a slot that is free, or else in a new one."""

    def __init__(self) -> None:
        self.all: list[Slot] = []

    def __call__(self, config: Path, log: Path, machine: Machine, gpus: Sequence[str]) -> SlotRun:
        assert not gpus
        free = next((slot for slot in self.all if slot.is_free()), None)
        if free is None:
            free = Slot(machine, log)
            self.all.append(free)
        return SlotRun(free, train_arguments(config), log)

    def __enter__(self) -> Slots:
        return self

    def __exit__(self, *_: object) -> None:
        for slot in self.all:
            slot.close()


def _serve(address: str) -> None:
    """What a rank does: one run after another, until the sweep is gone."""
    import_module(IMPORTS)
    with contextlib.suppress(EOFError, OSError):
        sweep = Client(address, family="AF_UNIX")
        sweep.send(int(os.environ["RANK"]))
        while True:
            order: Order = sweep.recv()
            pid = os.fork()
            if pid == 0:
                sweep.close()
                os._exit(_run(order))
            sweep.send(pid)
            _, status = os.waitpid(pid, 0)
            sweep.send(os.waitstatus_to_exitcode(status))
    with contextlib.suppress(OSError):  # another rank was faster
        Path(address).unlink()
        Path(address).parent.rmdir()


def _run(order: Order) -> int:
    try:
        os.setpgid(0, order.group)
    except OSError:  # whoever leads that group has ended already
        os.setpgid(0, 0)
    os.environ["MASTER_PORT"] = str(order.port)
    become(order.arguments, Path(order.log), Path(order.log))
    return command()


if __name__ == "__main__":
    _serve(os.environ.pop(ADDRESS))
