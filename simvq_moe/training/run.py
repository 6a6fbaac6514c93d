"""One run from its config to its exit code: folder, records, status, signals."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from simvq_moe.config.checks import check, check_ranks
from simvq_moe.config.checks_moe import with_gates
from simvq_moe.config.loading import mapping_to_yaml, to_yaml
from simvq_moe.config.schema import Config, without_other_tasks
from simvq_moe.costs.cluster import fitting_gpus, read_cluster
from simvq_moe.costs.estimate import estimate
from simvq_moe.engine.agreement import (
    Interrupted,
    TrainingFailed,
    WriteFailed,
    is_lost_rank,
    writing,
)
from simvq_moe.engine.settings import check_device, engine_settings, import_deepspeed
from simvq_moe.engine.slurm import adopt_slurm
from simvq_moe.engine.world import World, launched_rank, launched_ranks, start_distributed
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import BrokenFileError, read_json, write_atomically, write_json
from simvq_moe.records.catalogue import results
from simvq_moe.runs import checkpoint
from simvq_moe.runs.folder import (
    CONFIG,
    META,
    NOISE,
    SUMMARY,
    RunFolder,
    check_same_run,
    check_shared,
    claimed,
    has_summary,
)
from simvq_moe.runs.provenance import provenance
from simvq_moe.tasks.registry import check_files, fit_to_data
from simvq_moe.training.loop import Trainer

FINISHED, FAILED, INTERRUPTED = 0, 1, 130
"""Exit codes; 2 is a `ConfigError`."""


@dataclass(frozen=True)
class _Found:
    """The run's folder as this rank has found it."""

    folder: RunFolder | None = None
    """Rank 0's, which has it."""
    steps: int | None = None
    """That its run was to have so far; None: it is new."""
    finished: bool = False
    """Whether there is nothing to do."""


def train(config: Config) -> int:
    """Run or resume the config in its folder; the exit code.

    Raises:
        ConfigError: the config can't run here; nothing was written.
    """
    adopt_slurm(os.environ)
    config = with_gates(fit_to_data(config))
    _check_settings(config, launched_ranks())
    check_device(config)
    with _signals() as stop_asked, contextlib.ExitStack() as held:
        # a rank that is refused tells the others, which would wait for it; alone it says so at once
        found = _take(config, held) if launched_ranks() == 1 else None
        if found is not None and found.finished:
            return FINISHED
        with _noise(visible=launched_rank() == 0) as noise:
            world = start_distributed(config.train.timeout_s)
            found = found or world.agree(lambda: _take(config, held))
            finished, mark = world.gather((found.finished, found.folder and found.folder.mark))[0]
            if finished:
                return FINISHED
            world.agree(lambda: check_shared(config.run_dir, mark or ""))
            try:
                with writing(config.run_dir / NOISE):
                    noise.begin(config.run_dir / NOISE)
                return _run(config, world, found, stop_asked)
            except WriteFailed as failure:
                print(f"{config.run_dir}: {failure}", file=sys.stderr)
                return FAILED


def _take(config: Config, held: contextlib.ExitStack) -> _Found:
    """Check what must be here; rank 0 takes the folder for as long as `held` is open."""
    main = launched_rank() == 0
    check_files(config)
    if not main:
        return _Found()
    found = _look(config)
    if not found.finished:
        # another process may have been there since
        folder = held.enter_context(_alone_in(config.run_dir, main))
        found = replace(_look(config), folder=folder)
    if found.finished:
        print(f"{config.run_dir} is finished: nothing to do", file=sys.stderr)
    return found


def _look(config: Config) -> _Found:
    saved = check_same_run(config)
    steps = None if saved is None else saved.train.steps
    return _Found(steps=steps, finished=is_finished(config) and steps in (None, config.train.steps))


def check_launch(config: Config, world_size: int) -> None:
    """Raise `ConfigError` for whatever would keep this config from running on so many ranks."""
    config = with_gates(fit_to_data(config))
    _check_settings(config, world_size)
    _check_files(config)


def _check_settings(config: Config, world_size: int) -> None:
    """What the config alone says."""
    check(config)
    check_ranks(config, world_size)
    engine_settings(config, world_size)


def _check_files(config: Config) -> None:
    """What must be here: data, networks of measures, and no other run in the folder."""
    check_files(config)
    check_same_run(config)


def dry_run(config: Config, cluster_file: Path | None = None) -> int:
    """Print the resolved config and what the run would cost, the costs on standard output as JSON;
    write nothing. Data that are not here are said, and not needed.

    Args:
        cluster_file: YAML of the machines to predict the step time on.
    """
    config = with_gates(fit_to_data(config))
    check(config)
    cluster = None if cluster_file is None else read_cluster(cluster_file)
    ranks = launched_ranks() if cluster is None else fitting_gpus(config, cluster)[-1]
    _check_settings(config, ranks)
    text, costs = estimate(config, ranks, cluster)
    try:
        _check_files(config)
    except ConfigError as error:
        text += f"\n! would not start here: {error}"
    print(mapping_to_yaml(without_other_tasks(config)), text, sep="\n", file=sys.stderr)
    print(json.dumps(costs))
    return FINISHED


def is_finished(config: Config) -> bool:
    """Whether the run's folder holds its final numbers."""
    return has_summary(config.run_dir)


class _Record:
    """What is written down of a run beside its numbers: config.yaml and meta.json, by rank 0.

    Args:
        config: the run's.
        world: this rank among all.
        found: the run's folder.
    """

    def __init__(self, config: Config, world: World, found: _Found) -> None:
        self.config, self.world, self.found = config, world, found
        self.path = config.run_dir / META
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.meta = provenance(config, world) | {"started": started}
        self.before: dict[str, Any] = {}
        with contextlib.suppress(BrokenFileError):
            self.before = read_json(self.path, dict)

    @property
    def begun(self) -> bool:
        return self.found.folder is not None and self.found.folder.begun

    def begin(self, trainer: Trainer) -> None:
        """Say and write down what is trained, now that it can be; a run that is given more steps is
        not finished."""
        config, before = self.config, self.found.steps
        print(mapping_to_yaml(without_other_tasks(config)), file=sys.stderr)
        steps = config.train.steps
        if before is not None and before < steps:
            print(
                f"{config.run_dir} is given {steps} steps in place of {before}: it goes on from "
                "its last checkpoint, and from there the learning rate is that of the longer run",
                file=sys.stderr,
            )
        if self.found.folder is not None:
            self.found.folder.begun = True
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
        where = f"{self.config.run_dir} at step {step}"
        with contextlib.suppress(KeyError):  # none is known
            before, now = _ranks_of(self.before), _ranks_of(self.meta)
            if before != now:
                where += f" on {now}, not to the bit: it was on {before}"
        return where


def _run(config: Config, world: World, found: _Found, stop_asked: Callable[[], bool]) -> int:
    record = _Record(config, world, found)
    status, error, code = "finished", None, FINISHED
    summary: dict[str, float] = {}
    try:
        trainer = Trainer(config, world, stop_asked, record.begin)
        with contextlib.closing(trainer):
            summary = trainer.run()
        if world.is_main:
            _write_summary(config, summary)
    except Interrupted as stop:
        status, error, code = "interrupted", str(stop), INTERRUPTED
    except TrainingFailed as failure:
        status, error, code = "failed", str(failure), FAILED
    except ConfigError as refusal:
        if record.begun:
            record.end("failed", str(refusal))
        raise
    except Exception as failure:
        lost = is_lost_rank(failure)
        error = traceback.format_exc().strip().splitlines()[-1]
        if lost:
            error = _without_a_rank(config, world)
            print(f"{config.run_dir}: {error}", file=sys.stderr)
        record.end("failed", error)
        if not lost:
            raise
        return FAILED  # with no call that the lost rank would have to answer
    record.end(status, error)
    if world.is_main:
        print(f"{config.run_dir}: {error or describe_result(summary)}", file=sys.stderr)
    world.barrier()
    dist.destroy_process_group()
    return code


def _without_a_rank(config: Config, world: World) -> str:
    """What a run that has lost a rank says."""
    newest = checkpoint.latest_step(config.run_dir / "checkpoints")
    saved = "no checkpoint yet" if newest is None else f"newest checkpoint: step {newest}"
    return f"rank {world.rank}: another rank has ended ({saved}); the same command goes on"


def _ranks_of(meta: Mapping[str, Any]) -> str:
    """What the last bits of a CPU's sums depend on."""
    return f"{meta['world_size']} x {meta['threads']} threads"


def _write_summary(config: Config, summary: Mapping[str, float]) -> None:
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


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM are remembered, so that the loop stops after a whole step."""
    received: list[int] = []
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {s: signal.signal(s, lambda number, _: received.append(number)) for s in handled}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _alone_in(run_dir: Path, main: bool) -> Iterator[RunFolder | None]:
    """Two launches in one folder would overwrite each other; rank 0 has it for all ranks."""
    with claimed(run_dir) if main else contextlib.nullcontext() as folder:
        yield folder


class _Noise(io.TextIOBase):
    """A file that may be written to before it is known where it lies."""

    def __init__(self) -> None:
        self.file: TextIO = io.StringIO()

    def begin(self, path: Path) -> None:
        """From now on, and with what was written before, at the end of this file."""
        before, self.file = self.file, path.open("a", buffering=1)
        assert isinstance(before, io.StringIO)
        self.file.write(before.getvalue())

    def write(self, text: str, /) -> int:
        return self.file.write(text)

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def _noise(*, visible: bool) -> Iterator[_Noise]:
    """What libraries print, log and warn of goes to a file; our own warnings also to the user."""
    log = _Noise()
    with contextlib.redirect_stdout(log):
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        root, ours = logging.getLogger(), logging.getLogger("simvq_moe")
        console = logging.StreamHandler(sys.stderr)
        console.setLevel(logging.WARNING)
        ours.setLevel(logging.INFO)
        root.addHandler(handler)
        if visible:
            ours.addHandler(console)
        logging.captureWarnings(True)
        # deepspeed's logger has its own handler on standard output
        deepspeed_logger = import_deepspeed().utils.logger
        before = deepspeed_logger.handlers[:]
        deepspeed_logger.handlers[:] = [handler]
        try:
            yield log
        finally:
            deepspeed_logger.handlers[:] = before
            logging.captureWarnings(False)
            root.removeHandler(handler)
            ours.removeHandler(console)
            log.file.close()
