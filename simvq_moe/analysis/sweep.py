"""Sweeps: arms x paired seeds, each run by the deepspeed launcher, one after the other.

Finished runs are skipped and broken ones resumed, so that the same command always goes on from
where it stopped. A failed run stays in the plan and in the report as failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simvq_moe.config import Config
from simvq_moe.merging import ConfigError, merge_files, to_yaml, with_overrides
from simvq_moe.training.progress import duration

SECONDS_BETWEEN_LINES = 5.0
SECONDS_TO_SAVE = 60.0
"""Grace of an interrupted run, after which it is killed."""


@dataclass(frozen=True)
class ArmSpec:
    """One arm: what it changes in the group's config."""

    label: str
    """Name in tables."""
    control: bool = False
    """Whether the arm is there to explain another arm's effect."""
    set: dict[str, Any] = field(default_factory=dict)
    """Overrides of the config, nested by section."""


@dataclass(frozen=True)
class GroupSpec:
    """Arms that answer one question."""

    question: str
    """The question, in a sentence."""
    config: str
    """The config that all arms share, relative to the sweep's file."""
    baseline: str
    """Arm that the others are compared with."""
    outcomes: tuple[str, ...]
    """Measures that every arm is compared on, named before anything runs."""
    arms: dict[str, ArmSpec]
    """Arms by name."""
    primary: dict[str, str] = field(default_factory=dict)
    """The arms that decide the question, each with its outcome: the tests of Holm's adjustment.
    Empty: every outcome of every arm."""
    set: dict[str, Any] = field(default_factory=dict)
    """Overrides for every arm of the group."""
    notes: str = ""
    """What a reader must know, such as conventions that all arms share."""


@dataclass(frozen=True)
class SweepSpec:
    """A sweep."""

    name: str
    """Folder under runs_dir."""
    title: str
    """Title of the report."""
    groups: dict[str, GroupSpec]
    """Groups by name."""
    seeds: tuple[int, ...]
    """Paired seeds: the same initial weights and data order in every arm."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    set: dict[str, Any] = field(default_factory=dict)
    """Overrides for every run."""


@dataclass(frozen=True)
class Run:
    """One run of the plan."""

    group: str
    arm: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        return self.config.run_dir


@dataclass(frozen=True)
class Plan:
    """Every run of a sweep, in the order in which they are done."""

    spec: SweepSpec
    files: Sequence[Path]
    runs: list[Run]

    @property
    def folder(self) -> Path:
        return Path(self.spec.runs_dir) / self.spec.name


def plan(files: Sequence[Path]) -> Plan:
    """The runs of a sweep file; later files are merged on top.

    Raises:
        ConfigError: an unknown key, a baseline that is no arm, or a config that does not load.
    """
    spec = merge_files(SweepSpec, files)
    runs = []
    for name, group in spec.groups.items():
        if group.baseline not in group.arms:
            raise ConfigError(
                f"groups.{name}.baseline {group.baseline!r} is no arm: use one of "
                f"{', '.join(group.arms)}"
            )
        base = merge_files(Config, [files[0].parent / group.config])
        for overrides in (spec.set, group.set):
            base = with_overrides(base, overrides, f"{files[0]}: set")
        arms = {
            arm: with_overrides(base, one.set, f"{files[0]}: groups.{name}.arms.{arm}.set")
            for arm, one in group.arms.items()
        }
        runs += [_run(spec, name, arm, s, arms[arm]) for s in spec.seeds for arm in group.arms]
    return Plan(spec, files, runs)


def _run(spec: SweepSpec, group: str, arm: str, seed: int, config: Config) -> Run:
    name = f"{spec.name}/{group}/{arm}/seed{seed}"
    config = replace(config, name=name, runs_dir=spec.runs_dir, arm=arm, seed=seed)
    return Run(group, arm, seed, config)


def execute(plan: Plan, ranks: int) -> bool:
    """Do what is not done yet; whether every run is finished.

    Raises:
        KeyboardInterrupt: after the run under way has saved a checkpoint.
    """
    write_plan(plan, ranks)
    done = [run for run in plan.runs if status(run) == "finished"]
    if done:
        print(
            f"{len(done)} of {len(plan.runs)} runs are finished and skipped, others go on",
            file=sys.stderr,
        )
    clock = Clock(plan)
    for number, run in enumerate(plan.runs, start=1):
        if status(run) == "finished":
            continue
        label = f"[{number}/{len(plan.runs)}] {run.group}/{run.arm}/seed{run.seed}"
        _launch(run, plan, ranks, label, clock)
        write_plan(plan, ranks)
    return all(status(run) == "finished" for run in plan.runs)


def status(run: Run) -> str:
    """finished, failed, interrupted, running or pending, from the run's own records."""
    if (run.folder / "summary.json").is_file():
        return "finished"
    meta = run.folder / "meta.json"
    return json.loads(meta.read_text())["status"] if meta.is_file() else "pending"


def write_plan(plan: Plan, ranks: int) -> None:
    """sweep.json: the groups, arms and runs, for the report."""
    groups = []
    for name, group in plan.spec.groups.items():
        arms = [
            {
                "name": arm,
                "label": spec.label,
                "control": spec.control,
                "overrides": _dotted(spec.set),
                "runs": [
                    {
                        "seed": run.seed,
                        "dir": str(run.folder.relative_to(plan.folder)),
                        "status": status(run),
                    }
                    for run in plan.runs
                    if run.group == name and run.arm == arm
                ],
            }
            for arm, spec in group.arms.items()
        ]
        groups.append(
            {
                "name": name,
                "question": group.question,
                "config": group.config,
                "baseline": group.baseline,
                "outcomes": list(group.outcomes),
                "primary": dict(group.primary),
                "notes": group.notes,
                "arms": arms,
            }
        )
    plan.folder.mkdir(parents=True, exist_ok=True)
    configs = [word for file in plan.files for word in ("--config", str(file))]
    content = {
        "name": plan.spec.name,
        "title": plan.spec.title,
        "command": shlex.join(["simvq-moe", "sweep", *configs, "--ranks", str(ranks)]),
        "groups": groups,
    }
    (plan.folder / "sweep.json").write_text(json.dumps(content, indent=1) + "\n")


def _dotted(overrides: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        if isinstance(value, dict):
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class Clock:
    """Time left of a sweep, from the runs of the same group that it has seen to the end."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def left(self, current: Run, elapsed: float, share: float) -> float | None:
        """Seconds left, with `share` of the current run done after `elapsed`; None: unknown."""
        guess = elapsed / share if share > 0.05 else None
        ahead = self.plan.runs[self.plan.runs.index(current) :]
        every = [s for of_group in self.seconds.values() for s in of_group]
        total = 0.0
        for run in ahead:
            if status(run) == "finished":
                continue
            seen = self.seconds[run.group] or every
            expected = sum(seen) / len(seen) if seen else guess
            if expected is None:
                return None
            total += max(expected - elapsed, 0.0) if run is current else expected
        return total


def _launch(run: Run, plan: Plan, ranks: int, label: str, clock: Clock) -> None:
    """Start the run under the deepspeed launcher and follow it to its end."""
    configs = plan.folder / "configs"
    configs.mkdir(exist_ok=True)
    file = configs / f"{run.group}-{run.arm}-seed{run.seed}.yaml"
    file.write_text(to_yaml(run.config))
    run.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (run.folder / "launcher.log").open("a", buffering=1) as log:
        process = subprocess.Popen(
            command(file, ranks),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=_environment(ranks),
            # its own group, for the launcher leaves the ranks behind when it alone is killed
            start_new_session=True,
        )
        try:
            _follow(
                process,
                log,
                label,
                lambda share: clock.left(run, time.monotonic() - started, share),
            )
        except BaseException:
            _interrupt(process)
            raise
    if status(run) == "finished":
        clock.seconds[run.group].append(time.monotonic() - started)
    else:
        print(f"{label} {status(run)}: see {run.folder / 'launcher.log'}", file=sys.stderr)


def command(config: Path, ranks: int) -> list[str]:
    """The launcher's command line for one run of a config on this machine."""
    return [
        launcher(),
        "-q",
        *("--num_accelerators", str(ranks)),
        *("--master_port", str(_free_port())),
        *("--module", "simvq_moe", "train", "--config", str(config)),
    ]


def launcher() -> str:
    """Path of the deepspeed launcher that belongs to this Python, or else of the first on PATH."""
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        raise ConfigError("the deepspeed launcher is not on PATH: pip install deepspeed")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(ranks: int) -> dict[str, str]:
    """The ranks share this machine's cores."""
    import torch

    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": accelerator} | os.environ


def _follow(process: subprocess.Popen[str], log: Any, label: str, left: Any) -> None:
    print(f"{label}  starting", file=sys.stderr, flush=True)
    assert process.stdout is not None
    printed = time.monotonic()
    for line in process.stdout:
        log.write(line)
        if not line.startswith("step "):
            continue
        done, steps = (int(n) for n in line.split()[1].split("/"))
        if time.monotonic() - printed > SECONDS_BETWEEN_LINES or done == steps:
            printed = time.monotonic()
            seconds = left(done / steps)
            total = "" if seconds is None else f"  sweep ETA {duration(seconds)}"
            print(f"{label}  {line.rstrip()}{total}", file=sys.stderr, flush=True)
    process.wait()


def _interrupt(process: subprocess.Popen[str]) -> None:
    """Ask every process of the run to save and stop; kill what does not."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            # until the last process has closed the pipe, not only the launcher
            process.communicate(timeout=SECONDS_TO_SAVE)
        except subprocess.TimeoutExpired:
            continue
        return
