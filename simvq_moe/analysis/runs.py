"""Run directories as they are on disk, grouped into the comparisons they belong to.

A run may be finished, still going, killed in the middle of a line or never started; all of them
become a `Run`, because a report that drops the failures reports something else. The files of a
run are described where they are written (`simvq_moe.training`); nothing here writes.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from simvq_moe.analysis.measures import ALL_BANKS
from simvq_moe.merging import ConfigError

ENDED = ("finished", "failed", "interrupted")
UNCOMPARED_KEYS = ("seed", "name", "arm", "runs_dir")
"""Config keys that tell runs apart without changing what an arm is."""
ERROR_OUTCOMES = ("val/mse", "val/bits_per_byte", "val/loss")


@dataclass(frozen=True)
class Run:
    """One training run: one arm, one seed."""

    path: Path
    """The run directory; it need not exist (pending)."""
    arm: str
    """Name of the arm it belongs to."""
    seed: int
    """Seed of initial weights and data order; runs of one seed pair across arms."""
    status: str
    """finished, running, failed, interrupted, pending or missing."""
    error: str | None = None
    """One line that says why it failed."""
    config: dict[str, Any] = field(default_factory=dict)
    """Resolved config, flattened to dotted keys."""
    meta: dict[str, Any] = field(default_factory=dict)
    """meta.json."""
    metrics: tuple[dict[str, float], ...] = ()
    """The readable lines of metrics.jsonl, each step once, the latest line of a step."""
    final: dict[str, float] = field(default_factory=dict)
    """summary.json, or the last evaluation of a run that has none."""
    held_out_counts: np.ndarray | None = None
    """int64 [layer, slot]: draws over the whole held-out set at the last evaluation."""
    samples: tuple[Path, ...] = ()
    """What was made of held-out data, oldest first: images, texts, folders of sounds."""

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Kind, slots and top_k of every layer that chooses between slots."""
        return self.meta.get("layers") or []

    @property
    def step(self) -> int:
        """The last logged step."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    def layer_counts(self) -> Iterator[np.ndarray]:
        """Held-out counts of each layer, before any capacity, without the padding of layers with
        fewer slots."""
        counts = () if self.held_out_counts is None else self.held_out_counts
        for layer, row in zip(self.layers, counts, strict=False):
            if layer["kind"] != "kept":
                yield row[: layer["slots"]]

    def bank_metrics(self, leaf: str) -> dict[str, list[str]]:
        """Names under which a measure of banks is logged, by the kind of bank.

        See `bank_kind`; ALL_BANKS where names are not recorded.
        """
        names = self.meta.get("banks") or []
        logged = {n for m in self.metrics for n in m if n.startswith("bank/")}
        found: dict[str, list[str]] = {}
        for metric in sorted(n for n in logged if n.endswith(f"/{leaf}")):
            i = int(metric.split("/")[1])
            found.setdefault(bank_kind(names, i), []).append(metric)
        return found

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one metric where it is logged and finite."""
        pairs = [(m["step"], m[name]) for m in self.metrics if math.isfinite(m.get(name, math.nan))]
        found = np.array(pairs, dtype=float).reshape(-1, 2)
        return found[:, 0], found[:, 1]


@dataclass(frozen=True)
class Arm:
    """One condition of a comparison."""

    name: str
    label: str
    control: bool
    """An arm that a claim has to beat, rather than one that the claim is about."""
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Group:
    """Arms that answer one question, against one baseline."""

    name: str
    question: str
    baseline: str
    outcomes: tuple[str, ...]
    """Metrics that the question is decided on, fixed before the runs."""
    arms: tuple[Arm, ...]
    primary: dict[str, str] = field(default_factory=dict)
    """The arms that decide it, each with its outcome: the tests of Holm's adjustment. Empty: every
    outcome of every arm."""
    tuned: bool = False
    """Whether a grid chose each arm's learning rate."""
    notes: str = ""
    config: str = ""
    sweep: str = ""
    """Title of the sweep it belongs to; empty for runs that were found one by one."""
    command: str = ""
    """The command that does the whole sweep."""


def bank_kind(names: Sequence[str], i: int) -> str:
    """End of the name of bank i: experts.down of blocks.0.moe.experts.down.

    Args:
        names: those of the run's meta.json.
    """
    words = names[i].split(".") if i < len(names) else [ALL_BANKS]
    return ".".join([word for word in words if not word.isdigit()][-2:])


def find_groups(paths: Sequence[Path]) -> list[Group]:
    """The comparisons in sweeps and run directories at or below the paths, in that order.

    Raises:
        ConfigError: a path does not exist, or there is no run in it.
    """
    groups: list[Group] = []
    loose: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path} does not exist: give a run directory or a folder of runs")
        found = list(_walk(path))
        if not found:
            raise ConfigError(
                f"no runs found in {path}: a run directory holds config.yaml and metrics.jsonl"
            )
        for directory in found:
            if (directory / "sweep.json").is_file():
                groups += _read_sweep(directory)
            elif directory not in loose:
                loose.append(directory)
    return groups + _group_loose(loose)


def read_run(path: Path, *, arm: str | None = None, planned: dict[str, Any] | None = None) -> Run:
    """The run in a directory, whatever is there of it.

    Args:
        path: the run directory.
        arm: name of its arm; None: as its config says.
        planned: the sweep's entry for it (seed and status), which knows of runs that were killed.
    """
    planned = planned or {}
    config = _flatten(_read_config(path / "config.yaml"))
    meta, broken = _read_json(path / "meta.json")
    metrics = _read_metrics(path / "metrics.jsonl")
    summary, _ = _read_json(path / "summary.json")
    status = _status(path, meta, planned)
    evaluations = [m for m in metrics if any(key.startswith("val/") for key in m)]
    return Run(
        path=path,
        arm=arm or str(config.get("arm") or config.get("name") or path.name),
        seed=int(planned.get("seed", config.get("seed", meta.get("seed", 0)))),
        status=status,
        error=None if status == "finished" else _error(path, status, meta, broken),
        config=config,
        meta=meta,
        metrics=tuple(metrics),
        final=_numbers(summary) or dict(evaluations[-1] if evaluations else {}),
        held_out_counts=_read_counts(path / "usage.npz"),
        samples=tuple(sorted((path / "samples").glob("val_*"))),
    )


def _error(path: Path, status: str, meta: dict[str, Any], broken: str | None) -> str | None:
    found = meta.get("error") or broken
    if not found and status == "failed":
        return f"no error recorded: see {path.name}/launcher.log and log.txt"
    return found


def _status(path: Path, meta: dict[str, Any], planned: dict[str, Any]) -> str:
    """What became of it. A killed run still says "running"; its sweep may know better."""
    if (path / "summary.json").is_file():
        return "finished"
    if not path.is_dir():
        return "missing" if planned.get("status") in (None, "finished") else planned["status"]
    if meta.get("status") in ENDED:
        return meta["status"]
    if planned.get("status") in ("failed", "interrupted"):
        return planned["status"]
    if not meta and (path / "launcher.log").is_file():
        return "failed"
    return meta.get("status") or "pending"


def _walk(path: Path) -> Iterator[Path]:
    """Sweeps and run directories at or below a path; neither is searched any further."""
    for name, folders, files in os.walk(path):
        is_run = "config.yaml" in files and ("metrics.jsonl" in files or "meta.json" in files)
        if "sweep.json" in files or is_run:
            yield Path(name)
            folders.clear()
        folders.sort()


def _read_sweep(directory: Path) -> list[Group]:
    content, broken = _read_json(directory / "sweep.json")
    if broken:
        raise ConfigError(f"{directory / 'sweep.json'} is not readable: run the sweep again")
    return [
        Group(
            name=group["name"],
            question=group.get("question", ""),
            baseline=group["baseline"],
            outcomes=tuple(group["outcomes"]),
            primary=dict(group.get("primary") or {}),
            tuned=any("lr" in arm for arm in group["arms"]),
            arms=tuple(_read_arm(directory, arm) for arm in group["arms"]),
            notes=group.get("notes") or "",
            config=str(group.get("config") or ""),
            sweep=content.get("title") or content.get("name", ""),
            command=content.get("command") or "",
        )
        for group in content.get("groups", [])
    ]


def _read_arm(directory: Path, arm: dict[str, Any]) -> Arm:
    runs = (read_run(directory / run["dir"], arm=arm["name"], planned=run) for run in arm["runs"])
    return Arm(
        name=arm["name"],
        label=arm.get("label") or arm["name"],
        control=bool(arm.get("control", False)),
        runs=tuple(sorted(runs, key=lambda run: run.seed)),
    )


def _group_loose(directories: Sequence[Path]) -> list[Group]:
    """One group a task. Nobody registered a baseline, so it is the first arm by name, said so."""
    runs = [read_run(directory) for directory in directories]
    groups = []
    for task in sorted({str(run.config.get("task", "unknown")) for run in runs}):
        of_task = _distinct([r for r in runs if str(r.config.get("task", "unknown")) == task])
        names = sorted({run.arm for run in of_task})
        arms = tuple(
            Arm(
                name=name,
                label=name,
                control=False,
                runs=tuple(sorted((r for r in of_task if r.arm == name), key=lambda r: r.seed)),
            )
            for name in names
        )
        groups.append(
            Group(
                name=task,
                question=f"How do the runs of {task} compare?",
                baseline=names[0],
                outcomes=_outcomes(of_task),
                arms=arms,
                notes=f"Runs without a sweep: grouped by arm; the baseline is {names[0]} because "
                "it sorts first, not by a choice made before the runs.",
            )
        )
    return groups


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """Runs of the same arm and seed are told apart by their folder, so that none is lost."""
    keys = [(run.arm, run.seed) for run in runs]
    return [
        replace(run, arm=f"{run.arm} ({run.path.name})") if keys.count(key) > 1 else run
        for run, key in zip(runs, keys, strict=True)
    ]


def _outcomes(runs: Sequence[Run]) -> tuple[str, ...]:
    """The first known held-out error that any run has, and for codes the used share."""
    names = {name for run in runs for name in run.final}
    errors = [name for name in ERROR_OUTCOMES if name in names][:1]
    return (*(errors or ["val/loss"]), *({"val/codes/used"} & names))


def _read_json(file: Path) -> tuple[dict[str, Any], str | None]:
    """The content, and what is wrong with it; a missing file is just empty."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return {}, None
    except (ValueError, OSError):
        return {}, f"{file.name} is not readable"
    return (content, None) if isinstance(content, dict) else ({}, f"{file.name} is not readable")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, yaml.YAMLError, OmegaConfBaseException):
        return {}
    return {str(k): v for k, v in content.items()} if isinstance(content, dict) else {}


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_metrics(file: Path) -> list[dict[str, float]]:
    """One entry a step. A resumed run repeats steps: its later lines hold. Torn lines are left."""
    if not file.is_file():
        return []
    steps: dict[float, dict[str, float]] = {}
    for line in file.read_text(errors="replace").splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int | float):
            steps[content["step"]] = _numbers(content)
    return [steps[step] for step in sorted(steps)]


def _numbers(content: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in content.items() if isinstance(v, int | float)}


def _read_counts(file: Path) -> np.ndarray | None:
    """The held-out counts of the last evaluation; None if there are none (yet)."""
    try:
        # opened here, for numpy leaves a torn file open
        with file.open("rb") as stream, np.load(stream) as arrays:
            counts = arrays["val_counts"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
    return counts[-1] if counts.ndim == 3 and len(counts) else None
