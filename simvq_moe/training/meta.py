"""What is written down of a run beside its records: config.yaml, meta.json and summary.json."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from simvq_moe.config.checks_moe import with_default_gates
from simvq_moe.config.loading import changed, to_yaml
from simvq_moe.config.schema import Config
from simvq_moe.config.tasks import without_other_tasks
from simvq_moe.engine.agreement import TrainingFailed, WriteFailed, writing
from simvq_moe.engine.world import World
from simvq_moe.files.of_runs import CONFIG, META, SUMMARY
from simvq_moe.files.regular import BrokenFileError, read_json, write_atomically, write_json
from simvq_moe.files.yaml import plain_yaml
from simvq_moe.records.catalogue import results
from simvq_moe.runs.provenance import provenance
from simvq_moe.training.loop import Trainer
from simvq_moe.training.preflight import Preflight


class RunMeta:
    """What is written down of a run beside its numbers: config.yaml and meta.json, by rank 0.

    Args:
        run: what was settled before.
        world: this rank among all.
    """

    def __init__(self, run: Preflight, world: World) -> None:
        self.run, self.world = run, world
        config = run.config
        self.path = config.run_dir / META
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.meta = provenance(config, world) | {"started": started}
        self.before: dict[str, Any] = {}
        with contextlib.suppress(BrokenFileError):
            self.before = read_json(self.path, dict)

    @property
    def begun(self) -> bool:
        """Whether a run has begun, whose folder stays."""
        return self.run.folder is not None and self.run.folder.begun

    def begin(self, trainer: Trainer) -> None:
        """Say and write down what is trained, now that it can be; a run that is given more steps is
        not finished."""
        config, before = self.run.config, self.run.steps_before
        print(differing(config), file=sys.stderr)
        for warning in doubts(config):
            print(f"warning: {warning}", file=sys.stderr)
        steps = config.train.steps
        if before is not None and before < steps:
            print(
                f"{config.run_dir} is given {steps} steps in place of {before}: it goes on from "
                "its last checkpoint, and from there the learning rate is that of the longer run",
                file=sys.stderr,
            )
        if self.run.folder is not None:
            self.run.folder.begun = True
        with writing(config.run_dir):
            if before != steps:
                (config.run_dir / SUMMARY).unlink(missing_ok=True)
            write_atomically(config.run_dir / CONFIG, to_yaml(config))
        self.meta |= trainer.description()
        self._write("running", None)
        if trainer.resumed_from:
            print(f"resuming {self._where(trainer.resumed_from)}", file=sys.stderr)

    def end(self, status: str, error: str | None) -> None:
        """Write down what became of it; a full disk has been told."""
        if self.world.is_main:
            with contextlib.suppress(WriteFailed):
                self._write(status, error)

    def _write(self, status: str, error: str | None) -> None:
        with writing(self.path):
            write_json(self.path, self.before | self.meta | {"status": status, "error": error})

    def _where(self, step: int) -> str:
        where = f"{self.run.config.run_dir} at step {step}"
        with contextlib.suppress(KeyError):  # none is known
            before, now = _ranks_of(self.before), _ranks_of(self.meta)
            if before != now:
                where += f" on {now}, not to the bit: it was on {before}"
        return where


def differing(config: Config) -> str:
    """What of a config is not as it is by default, a key a line; config.yaml has all of it."""
    mine, given = without_other_tasks(config), changed(with_default_gates(config))
    found = {key: value for key, value in given.items() if key.split(".")[0] in mine}
    return f"{config.run_dir / CONFIG}, where not as by default:\n{plain_yaml(found)}"


def doubts(config: Config) -> list[str]:
    """What can be trained and is hardly meant, a sentence each."""
    steps, warmup = config.train.steps, config.optimizer.warmup_steps
    if warmup <= steps:
        return []
    return [
        f"train.steps {steps} end before optimizer.warmup_steps {warmup} do, so the learning rate "
        f"stays below optimizer.lr {config.optimizer.lr}"
    ]


def _ranks_of(meta: Mapping[str, Any]) -> str:
    """What the last bits of a CPU's sums depend on."""
    return f"{meta['world_size']} x {meta['threads']} threads"


def write_summary(config: Config, summary: Mapping[str, float]) -> None:
    """Write the final numbers, with which a run is finished.

    Raises:
        TrainingFailed: they can't be written.
    """
    path = config.run_dir / SUMMARY
    try:
        with writing(path):
            write_json(path, {"status": "finished", **summary})
    except WriteFailed as failure:
        raise TrainingFailed(f"{failure}; make room, and give the same command again") from failure


def describe_result(summary: Mapping[str, float]) -> str:
    """A finished run in one line."""
    parts = [f"{name} {summary[name]:.4g}" for name in results() if name in summary]
    return ", ".join(["finished", *parts])
