"""Doing a sweep: runs side by side on this machine, each in processes of its own.

A run writes to launcher.log in its folder and is followed by what it writes there, so that it does
not depend on the sweep that started it. If that one was killed, its runs go on, and the same
command follows them. One that fails is told and left, and the others go on.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from simvq_moe.config.loading import to_yaml
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import write_atomically
from simvq_moe.records.progress import duration
from simvq_moe.sweeps import rate_grid
from simvq_moe.sweeps.plan import Plan, Run, read_meta, replace_json, share, status, write_plan

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_LOOKS = 0.3
SECONDS_TO_SAVE = 60.0
"""Grace of an interrupted run, after which it is killed."""
USAGE_ERROR = 2
"""Exit code of a run that was refused before it began."""
LOCK = ".lock"
"""File of a run's folder that the process which trains there keeps locked."""


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
        """Of a process."""
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


def execute(plan: Plan, machine: Machine, index: int = 0, count: int = 1) -> list[Run]:
    """Do what is not done yet of share `index` of `count`; every run of that share.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM, after the runs under way have saved and stopped.
        ConfigError: see `rate_grid.grid_runs` and `rate_grid.choose`.
    """
    grid = plan.spec.lr_grid is not None
    own = share(plan.runs, index, count, whole_arms=grid)
    tried = [
        r for r in rate_grid.grid_runs(plan) if (r.group, r.arm) in {(o.group, o.arm) for o in own}
    ]
    options = ("--ranks", str(machine.ranks), "--parallel", str(machine.parallel))

    def changed() -> None:
        write_plan(rate_grid.with_rates(plan), options, rate_grid.chosen(plan))

    changed()
    done = sum(status(run) == "finished" for run in own)
    if done:
        print(f"{done} of {len(own)} runs are finished and skipped, others go on", file=sys.stderr)
    pool = Pool(plan.folder, machine, [*tried, *own], changed)
    with _stopped_by_sigterm():
        if tried:
            pool.do(tried)
            rate_grid.choose(plan, tried)
            changed()
        own = share(rate_grid.with_rates(plan).runs, index, count, whole_arms=grid)
        pool.do(own)
    return own


class Pool:
    """Runs under way on this machine, and those that wait.

    Args:
        folder: the sweep's.
        machine: how many at a time, on what.
        runs: all that there are, for their numbers and the time left.
        changed: called whenever a run begins or ends.
    """

    def __init__(
        self, folder: Path, machine: Machine, runs: Sequence[Run], changed: Callable[[], None]
    ) -> None:
        self.folder, self.machine, self.changed = folder, machine, changed
        self.numbers = {run.name: i for i, run in enumerate(runs, start=1)}
        self.waiting = {run.name: run.group for run in runs if status(run) != "finished"}
        self.going: dict[int, Followed] = {}
        self.clock = Clock()

    def do(self, runs: Sequence[Run]) -> None:
        """Bring these runs to an end, as many at a time as the machine takes."""
        todo = [run for run in runs if run.name in self.waiting]
        try:
            while todo or self.going:
                for slot in range(self.machine.parallel):
                    if todo and slot not in self.going:
                        self._start(todo.pop(0), slot)
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for slot, process in list(self.going.items()):
                    if self._look_at(slot, process):
                        todo.insert(0, process.run)
        except BaseException:
            own = [process for process in self.going.values() if isinstance(process, Process)]
            stop([process.popen for process in own])
            for process in own:
                _record_end(process, "interrupted")
            for process in self.going.values():
                if process not in own:
                    print(f"{process.label}  goes on, for another started it", file=sys.stderr)
            self.going.clear()
            self.changed()
            raise

    def _start(self, run: Run, slot: int) -> None:
        self.waiting.pop(run.name, None)
        label = f"[{self.numbers[run.name]}/{len(self.numbers)}] {run.name}"
        if is_trained(run.folder):
            self.going[slot] = Followed(run, label)
            print(f"{label}  goes on in another process", file=sys.stderr, flush=True)
        else:
            file = self.folder / "configs" / f"{run.name.replace('/', '-')}.yaml"
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, to_yaml(run.config))
            self.going[slot] = Process(run, label, file, self.machine, slot)
            print(f"{label}  starting", file=sys.stderr, flush=True)
        self.changed()

    def _look_at(self, slot: int, process: Followed) -> bool:
        """Tell what a run has done since; whether it has ended and is to be begun, or followed,
        again."""
        code = process.poll()  # before its last lines are read
        if process.read() or (code is None and process.is_due()):
            process.printed = time.monotonic()
            seconds = self.clock.left(
                list(self.going.values()), list(self.waiting.values()), self.machine.parallel
            )
            total = "" if seconds is None else f"  sweep ETA {duration(seconds)}"
            print(f"{process.label}  {process.line}{total}", file=sys.stderr, flush=True)
        if code is None:
            return False
        del self.going[slot]
        again = False
        if status(process.run) == "finished":
            self.clock.seen[process.run.group].append(process.seconds)
        elif not isinstance(process, Process):
            again = True
        elif code == USAGE_ERROR and is_trained(process.run.folder):
            again = True  # one that a killed sweep had just started was faster
        else:
            _record_end(process, "failed")
            told = f"see {process.log} ({process.last_words()})"
            print(f"{process.label} {status(process.run)}: {told}", file=sys.stderr, flush=True)
        self.changed()
        return again


def is_trained(folder: Path) -> bool:
    """Whether a process trains in a run's folder, where locks can tell."""
    try:
        with (folder / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # nobody has, or the file system has no locks
        return False
    return False


class Followed:
    """A run under way, followed in its launcher.log; another process has started it."""

    def __init__(self, run: Run, label: str) -> None:
        self.run, self.label = run, label
        self.log = run.folder / "launcher.log"
        self.began = self.printed = time.monotonic()
        self.line, self.share = "", 0.0
        self.first: tuple[float, float] | None = None
        """Seconds and share at its first line, before which it was starting."""
        self.read_to = 0

    def poll(self) -> int | None:
        """0 once it has ended, however."""
        return None if is_trained(self.run.folder) else 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def seconds_left(self) -> float | None:
        """At its own speed since its first line; None: it has told only one."""
        if self.first is None or self.share <= self.first[1]:
            return None
        began, share = self.first
        return (1 - self.share) * (self.seconds - began) / (self.share - share)

    def is_due(self) -> bool:
        """Whether it has something to tell that is not told yet."""
        return 0 < self.share < 1 and time.monotonic() - self.printed > SECONDS_BETWEEN_LINES

    def read(self) -> bool:
        """Take up what it has written since; whether it has just told its last step."""
        if not self.log.is_file():  # of one that was started by hand
            return False
        with self.log.open("rb") as log:
            log.seek(self.read_to)
            new = log.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.read_to += len(whole)
        lines = [x for x in whole.decode(errors="replace").splitlines() if x.startswith("step ")]
        if not lines:
            return False
        self.line = lines[-1].rstrip()
        done, steps = (int(n) for n in self.line.split()[1].split("/"))
        self.share = done / steps
        self.first = self.first or (self.seconds, self.share)
        return done == steps

    def last_words(self) -> str:
        """The last line of the log."""
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no word")


class Process(Followed):
    """A run that is started here."""

    def __init__(self, run: Run, label: str, config: Path, machine: Machine, slot: int) -> None:
        super().__init__(run, label)
        run.folder.mkdir(parents=True, exist_ok=True)
        self.read_to = self.log.stat().st_size if self.log.is_file() else 0
        gpus = machine.gpus_of(slot)
        with self.log.open("a") as log:
            self.popen = subprocess.Popen(
                command(config, machine.ranks, gpus),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(machine, gpus),
                # its own group, for the launcher leaves the ranks behind when it alone is killed
                start_new_session=True,
            )

    def poll(self) -> int | None:
        return self.popen.poll()


class Clock:
    """Time left of a sweep, from the runs that it has seen to the end and those under way."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = defaultdict(list)
        """Seconds of each finished run, by group."""

    def left(self, going: Sequence[Followed], waiting: Sequence[str], slots: int) -> float | None:
        """Seconds until the last run ends, each started where one ends; None: unknown.

        Args:
            going: the runs under way.
            waiting: the groups of the others, in their order.
            slots: runs at a time.
        """
        guesses: dict[str, list[float]] = defaultdict(list)
        for one in going:
            if (more := one.seconds_left()) is not None:
                guesses[one.run.group].append(one.seconds + more)

        def expected(group: str) -> float | None:
            every = ([s for of in by.values() for s in of] for by in (self.seen, guesses))
            for found in (self.seen[group], guesses[group], *every):
                if found:
                    return sum(found) / len(found)
            return None

        ends = [0.0] * (slots - len(going))
        for one in going:
            more, whole = one.seconds_left(), expected(one.run.group)
            if more is None and whole is None:
                return None
            ends.append(max(0.0, (whole or 0.0) - one.seconds) if more is None else more)
        heapq.heapify(ends)
        for group in waiting:
            seconds = expected(group)
            if seconds is None:
                return None
            heapq.heapreplace(ends, ends[0] + seconds)
        return max(ends)


def command(config: Path, ranks: int, gpus: Sequence[str] = ()) -> list[str]:
    """The command line of one run of a config on this machine.

    One rank needs no launcher, which takes seconds to start. The launcher takes the devices from
    CUDA_VISIBLE_DEVICES unless it is told their number.
    """
    train = ["simvq_moe", "train", "--config", str(config)]
    if ranks == 1:
        return [sys.executable, "-m", *train]
    number = () if gpus else ("--num_accelerators", str(ranks))
    return [launcher(), "-q", *number, "--master_port", str(free_port()), "--module", *train]


def launcher() -> str:
    """Path of the deepspeed launcher that belongs to this Python, or else of the first on PATH."""
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        raise ConfigError("the deepspeed launcher is not on PATH: pip install deepspeed")
    return found


def free_port() -> int:
    """Of this machine, at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(machine: Machine, gpus: Sequence[str]) -> dict[str, str]:
    """The runs and their ranks share this machine's cores and GPUs."""
    accelerator = "cuda" if machine.gpus else "cpu"
    ours = {"OMP_NUM_THREADS": str(machine.threads), "DS_ACCELERATOR": accelerator}
    dealt = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    return ours | os.environ | dealt


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask every process of these runs to save and stop; kill those that do not."""
    members: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            # the ranks may outlive the launcher
            members += [*(p := psutil.Process(process.pid)).children(recursive=True), p]
    for number in (signal.SIGINT, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        until = time.monotonic() + SECONDS_TO_SAVE
        while any(_is_alive(p) for p in members) and time.monotonic() < until:
            time.sleep(0.1)
    for process in processes:
        process.wait()


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _record_end(process: Process, became: str) -> None:
    """Write down the end of a run that could not do so itself: killed, or refused at its start."""
    file = process.run.folder / "meta.json"
    meta = read_meta(process.run.folder)
    code = process.popen.returncode
    if meta and (meta.get("status") != "running" or code == USAGE_ERROR):  # refused: another has it
        return
    if not meta and became == "interrupted":
        return  # it had not begun
    why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    error = f"{why}; its last words: {process.last_words()}"
    replace_json(file, meta | {"status": became, "error": error})


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM, as a cluster sends it before the time is up, stops like Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
