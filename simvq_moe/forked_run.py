"""Runs in processes forked from one that has imported all that a run needs.

Python, torch and DeepSpeed take seconds to start, in the launcher and in every rank. A sweep on
CPUs pays for that once: its runs are forked from a process that has imported everything and done
nothing, so that each begins in the state of a fresh process, and none can leave anything behind for
the next. With GPUs the launcher starts every run, because CUDA's driver can't be forked.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

from simvq_moe.config.schema import Config
from simvq_moe.sweeps.machine import Machine, environment, free_port, train_arguments

IMPORTS = "simvq_moe.prepared"
"""Module that imports all that a run needs; named here, because this process does not."""
HELD = {signal.SIGINT, signal.SIGTERM}
"""Signals that wait while processes are started."""
SECONDS_TO_END = 30
"""Grace of the ranks that are left when one has failed, after which they are killed."""


def can_fork(machine: Machine, configs: Sequence[Config]) -> bool:
    """Whether runs on this machine can be forked; those that compile import more."""
    here = sys.platform == "linux" and not machine.gpus
    return here and not any(config.train.compile for config in configs)


class ForkedRun:
    """A run as `subprocess.Popen` has it, in a session of its own; of several ranks, their parent.

    Args:
        arguments: of simvq-moe.
        log: file that its output is added to.
        ranks: its processes.
        variables: of its environment.
        results: file that its standard output is added to; None: also to the log.
        folder: that it works in; None: this one.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        ranks: int,
        variables: Mapping[str, str],
        results: Path | None = None,
        folder: Path | None = None,
    ) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload([IMPORTS])
        self._process = context.Process(
            target=_begin,
            kwargs={
                "arguments": tuple(arguments),
                "results": results or log,
                "log": log,
                "ranks": ranks,
                "variables": dict(variables),
                "folder": folder or Path.cwd(),
            },
        )
        # one that is interrupted has either not been started, or is known
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
        try:
            with _environment(variables):  # the first start begins the process that is forked
                self._process.start()
            assert self._process.pid is not None
            self.pid = self._process.pid
            while self.poll() is None and not _leads_a_group(self.pid):
                time.sleep(0.001)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        return code


def forked(config: Path, log: Path, machine: Machine, gpus: Sequence[str]) -> ForkedRun:
    """The run of a config, as a sweep starts it."""
    return ForkedRun(train_arguments(config), log, machine.ranks, environment(machine, gpus))


def _leads_a_group(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _begin(
    arguments: Sequence[str],
    results: Path,
    log: Path,
    ranks: int,
    variables: Mapping[str, str],
    folder: Path,
) -> None:
    """What the forked process does; it never returns."""
    os.setsid()
    os.chdir(folder)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # as for `python -m simvq_moe`: plug-ins may lie there
    os.environ.clear()
    os.environ.update(variables)
    become(arguments, results, log)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
    os._exit(command() if ranks == 1 else _ranks(ranks))


def become(arguments: Sequence[str], results: Path, log: Path) -> None:
    """Make this process simvq-moe with these arguments, whose output is added to files."""
    added = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for stream, path, flags in ((0, os.devnull, os.O_RDONLY), (1, results, added), (2, log, added)):
        os.dup2(os.open(path, flags, 0o666), stream)
    # those of the process that it is forked from remember whether theirs could be sought
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    sys.argv = ["simvq-moe", *arguments]


def command() -> int:
    """`simvq-moe` with the arguments of sys.argv; the exit code."""
    from simvq_moe.cli import main

    try:
        return main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _ranks(number: int) -> int:
    """The command on several ranks; the exit code of the first that fails, or 0."""
    os.environ |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    going: set[int] = set()
    for rank in range(number):
        pid = os.fork()
        if pid == 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os._exit(command())
        going.add(pid)

    def tell(number: int) -> None:
        for pid in going:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the ranks have it as well, and save
    signal.signal(signal.SIGTERM, lambda *_: tell(signal.SIGTERM))
    signal.signal(signal.SIGALRM, lambda *_: tell(signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
    failed = 0
    while going:
        pid, status = os.wait()
        going.discard(pid)
        if not failed and (failed := os.waitstatus_to_exitcode(status)):
            tell(signal.SIGTERM)
            signal.alarm(SECONDS_TO_END)
    if failed < 0:  # killed by a signal, and so is this process
        if failed != -signal.SIGKILL:
            signal.signal(-failed, signal.SIG_DFL)
        os.kill(os.getpid(), -failed)
    return failed
