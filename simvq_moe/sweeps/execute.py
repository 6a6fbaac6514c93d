"""Doing a sweep: runs side by side on this machine, each in processes of its own.

A run writes to launcher.log in its folder and is followed by what it writes there, so that it does
not depend on the sweep that started it. If that one was killed, its runs go on, and the same
command follows them. One that fails is told and left, and the others go on.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from simvq_moe.config.loading import to_yaml
from simvq_moe.errors import USAGE_ERROR
from simvq_moe.files.regular import write_atomically
from simvq_moe.files.temporary import interrupted_by
from simvq_moe.records.progress import duration
from simvq_moe.runs.folder import is_trained
from simvq_moe.sweeps import rate_grid
from simvq_moe.sweeps.followed import Clock, Followed, Process
from simvq_moe.sweeps.machine import Machine, Starter, launched, stop
from simvq_moe.sweeps.plan import PlannedRun, SweepPlan, share, write_plan
from simvq_moe.sweeps.registration import stamps

SECONDS_BETWEEN_LOOKS = 0.3


def execute(
    plan: SweepPlan,
    machine: Machine,
    index: int = 0,
    count: int = 1,
    *,
    starter: Starter = launched,
) -> list[PlannedRun]:
    """Do what is not done yet of share `index` of `count`; every run of that share.

    Args:
        starter: what starts a run.

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

    registered = stamps(plan.files, plan.spec.predictions, plan.folder)

    def changed() -> None:
        write_plan(rate_grid.with_rates(plan), options, registered, rate_grid.chosen(plan))

    changed()
    done = sum(run.status == "finished" for run in own)
    if done:
        print(f"{done} of {len(own)} runs are finished and skipped, others go on", file=sys.stderr)
    pool = Pool(plan.folder, machine, [*tried, *own], changed, starter)
    with interrupted_by(signal.SIGTERM):  # as a cluster sends it before the time is up
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
        starter: what starts a run.
    """

    def __init__(
        self,
        folder: Path,
        machine: Machine,
        runs: Sequence[PlannedRun],
        changed: Callable[[], None],
        starter: Starter = launched,
    ) -> None:
        self.starter = starter
        self.folder, self.machine, self.changed = folder, machine, changed
        self.numbers = {run.name: i for i, run in enumerate(runs, start=1)}
        self.waiting = {run.name: run.group for run in runs if run.status != "finished"}
        self.going: dict[int, Followed] = {}
        self.clock = Clock()

    def do(self, runs: Sequence[PlannedRun]) -> None:
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
            stop([process.started for process in own])
            for process in own:
                process.record_end("interrupted")
            for process in self.going.values():
                if process not in own:
                    print(f"{process.label}  goes on, for another started it", file=sys.stderr)
            self.going.clear()
            self.changed()
            raise

    def _start(self, run: PlannedRun, slot: int) -> None:
        self.waiting.pop(run.name, None)
        label = f"[{self.numbers[run.name]}/{len(self.numbers)}] {run.name}"
        if is_trained(run.folder):
            self.going[slot] = Followed(run, label)
            print(f"{label}  goes on in another process", file=sys.stderr, flush=True)
        else:
            file = self.folder / "configs" / f"{run.name.replace('/', '-')}.yaml"
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, to_yaml(run.config))
            self.going[slot] = Process(run, label, file, self.machine, slot, self.starter)
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
        if process.run.status == "finished":
            self.clock.seen[process.run.group].append(process.seconds)
        elif not isinstance(process, Process):
            again = True
        elif code == USAGE_ERROR and is_trained(process.run.folder):
            again = True  # one that a killed sweep had just started was faster
        else:
            process.record_end("failed")
            told = f"see {process.log} ({process.last_words()})"
            print(f"{process.label} {process.run.status}: {told}", file=sys.stderr, flush=True)
        self.changed()
        return again
