"""The training loop: one DeepSpeed engine, any number of ranks, exact to resume.

A step's global batch follows from the seed and the step alone, and each rank takes its share, so
the position is the step number. All ranks agree at every step whether to go on: a signal, a loss
that is not finite or a full disk on one of them stops all, and what a bad step did is never saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

from simvq_moe.config.loading import to_yaml
from simvq_moe.config.schema import Config
from simvq_moe.core.shares import in_shares, move
from simvq_moe.core.step_state import follow_steps
from simvq_moe.data.text.streaming import TextStream
from simvq_moe.engine.agreement import (
    Interrupted,
    TrainingFailed,
    WriteFailed,
    said_by_any,
    together,
)
from simvq_moe.engine.build import make_engine
from simvq_moe.engine.sharding import in_turn
from simvq_moe.engine.step_phases import Phase, profiled
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.files.of_runs import CHECKPOINTS
from simvq_moe.records.progress import Progress
from simvq_moe.runs import checkpoint
from simvq_moe.runs.saving import Saves
from simvq_moe.tasks.registry import AnyTask, build_task
from simvq_moe.training.reader import BatchReader
from simvq_moe.training.recorder import HeldOut, Recorder
from simvq_moe.training.skipped_steps import SkippedSteps
from simvq_moe.training.step import OptimizerStep
from simvq_moe.training.watchdog import Watchdog


class Trainer:
    """One run of one config on this rank.

    Args:
        config: what to train; its run folder exists.
        world: this rank among all.
        stop_asked: whether a signal has asked this process to stop.
        begin: called on rank 0 once nothing stands in the way of training, before the first record.

    Raises:
        ConfigError: on every rank, if the data or the model of one refuse the config.
        WriteFailed: on every rank, if rank 0 can't write records.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        stop_asked: Callable[[], bool],
        begin: Callable[[Trainer], None] | None = None,
    ) -> None:
        self.config, self.world, self.stop_asked = config, world, stop_asked
        self.began = time.monotonic()
        self.checkpoints = config.run_dir / CHECKPOINTS
        self.task = _build(config, world)
        model, self.step = self.task.model, 0
        self.reader = BatchReader(config, self.task, world)
        if self.task.starts_from_data:
            # before the engine, which copies the parameters
            with in_turn(model):
                self.task.start(self.reader.first_batch().to(world.device))
        follow_steps(model)
        self.recorder = Recorder(config, self.task, world)
        self.engine = make_engine(model, config, world)
        if config.train.compile:
            self.task.compile()  # after the engine, which sets the precision
        self.parts = (self.reader, self.recorder)
        """What keeps a state of its own in a checkpoint, beside the engine's."""
        restored = checkpoint.restore(self.engine, self.checkpoints, world, config.seed)
        if restored is not None:
            self.step = restored.step
            for part in self.parts:
                part.take_up(restored)
        self.resumed_from = self.step
        self.reader.open(self.step)
        self.recorder.open(self.step)
        together(world, lambda: self._begin_records(begin) if world.is_main else None)
        self.saves = Saves(self.checkpoints, world, config.train)
        self.optimizer_step = OptimizerStep(self.engine, model, config.train, world, self._phase)
        self.skipped = SkippedSteps(self.engine, model, config.train, world, self._saved)
        self.watchdog = Watchdog(config.run_dir, world, config.train.timeout_s)

    def run(self) -> dict[str, float]:
        """Train to the last step; the final held-out measures and the cost.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint was saved.
            TrainingFailed: a loss or a gradient is not finite, or something can't be written.
        """
        self.watchdog.start(self.step + 1)
        traced = self.config.train.profile and self.world.is_main
        folder = self.config.run_dir / "profile" if traced else None
        with self.recorder.phases.collectives_timed(), profiled(folder) as step_done:
            return self._run(step_done)

    def _run(self, step_done: Callable[[], None]) -> dict[str, float]:
        train = self.config.train
        progress = Progress(train.steps, self.step)
        latest: HeldOut | None = None
        while self.step < train.steps:
            stop = self.update()
            step_done()
            last = self.step == train.steps
            held_out = None
            if last or self.step % train.eval_every == 0:
                latest = held_out = self.evaluate()
            if self._is_logged(self.step) and self.recorder.has_steps:
                metrics = self.write_log(held_out)
                if self.world.is_main:
                    progress.show(self.step, metrics)
            if last or stop or self.step % train.save_every == 0:
                self.save(wait=last or stop)
            if stop and not last:
                raise Interrupted(
                    f"stopped at step {self.step}, which is saved; the same command goes on"
                )
        measures = (latest or self.evaluate()).measures
        wall = {"time/wall_s": time.monotonic() - self.began}
        return measures | self.recorder.summary(self.step) | wall

    def update(self) -> bool:
        """One optimizer step over this rank's share of the global batch; whether to stop after."""
        step = self.step + 1
        if self._is_logged(step):
            self.recorder.before_logged_step()
        started = time.monotonic()
        self.skipped.before_step()
        with self._phase("data"):
            micro_batches = self.reader.read()
        unwritten = self.recorder.unwritten is not None or self.saves.failed
        failed = unwritten or self.reader.broken is not None
        outcome = self.optimizer_step.take(micro_batches, self.stop_asked, failed=failed)
        if outcome.failed:
            raise self._failure()
        if outcome.taken:
            self.recorder.add(outcome)
            self.skipped.taken()
        else:
            self.skipped.leave_out(step, outcome)
        self.step = step
        self.recorder.add_seconds(time.monotonic() - started)
        return outcome.stop

    def evaluate(self) -> HeldOut:
        """Held-out measures at this step; all ranks call it together."""
        self.watchdog.move(self.step, "evaluation")
        return self.recorder.evaluate(self.step)

    def write_log(self, held_out: HeldOut | None = None) -> dict[str, float]:
        """A line of the log of the steps since the last one; all ranks call it together."""
        self.watchdog.move(self.step, "records")
        engine_metrics = {"train/lr": self.engine.get_lr()[0]} | self.skipped.metrics()
        return self.recorder.write(self.step, engine_metrics, held_out)

    def save(self, *, wait: bool = True) -> None:
        """Save a checkpoint of this step; all ranks call it together.

        Args:
            wait: also for what is written while training may go on.

        Raises:
            TrainingFailed: one could not write it, the one before, or its records.
        """
        self.watchdog.move(self.step, "checkpoint")
        self.recorder.flush()
        state = reduce(checkpoint.LoopState.__or__, (part.state() for part in self.parts))
        try:
            together(self.world, self.recorder.check_written)
            self.saves.begin(self.engine, self.step, state, to_yaml(self.config))
            if wait:
                self.saves.finish()
        except WriteFailed as failure:
            raise TrainingFailed(self._not_saved(failure)) from failure

    def close(self) -> None:
        """Finish checkpoint and records, also after a failure."""
        self._settle()
        self.saves.close()
        self.watchdog.stop()
        self.reader.close()
        self.recorder.close()

    def description(self) -> dict[str, Any]:
        """What meta.json says of the model and its data."""
        train = self.task.train
        return {
            "layers": [vars(layer) for layer in self.recorder.layers],
            "banks": self.recorder.banks.names,
            **self.recorder.cost,
            "samples": {
                "train": None if isinstance(train, TextStream) else len(train),
                "held_out": len(self.task.held_out),
            },
            "tokens_per_sample": self.task.tokens_per_sample,
            "trackers": self.recorder.tracker_ids,
        }

    def _begin_records(self, begin: Callable[[Trainer], None] | None) -> None:
        if begin is not None:
            begin(self)
        self.recorder.begin(self.step)

    def _is_logged(self, step: int) -> bool:
        train = self.config.train
        return step == train.steps or step % train.log_every == 0 or step % train.eval_every == 0

    def _phase(self, phase: Phase) -> AbstractContextManager[None]:
        self.watchdog.move(self.step + 1, phase)
        return self.recorder.phases.phase(phase)

    def _failure(self) -> TrainingFailed:
        """Why ranks can't go on: data that could not be read, or records not written."""
        unread = said_by_any(self.world, self.reader.broken)
        if unread:
            return TrainingFailed(f"step {self.step + 1}: {unread} (newest: {self._saved()})")
        self._settle()
        try:
            self.saves.finish()
        except WriteFailed as failure:
            return TrainingFailed(self._not_saved(failure))
        return TrainingFailed(self._not_saved(self.recorder.unwritten))

    def _not_saved(self, failure: WriteFailed | None) -> str:
        return (
            f"stopped at step {self.step}: {failure} (newest: {self._saved()}); make room, and the "
            "same command goes on"
        )

    def _saved(self) -> str:
        """The newest checkpoint, as rank 0 finds it, which is the one to tell."""
        self._settle()
        if not self.world.is_main:
            return ""
        step = checkpoint.latest_step(self.checkpoints)
        return "no checkpoint yet" if step is None else f"checkpoint {self.checkpoints / str(step)}"

    def _settle(self) -> None:
        """Wait until a checkpoint that was begun is saved or has failed, for however long."""
        self.watchdog.move(self.step, "checkpoint")
        self.saves.settle()


def _build(config: Config, world: World) -> AnyTask:
    if config.moe.expert_parallel > 1:
        # all ranks at once, not in turn
        from simvq_moe.moe.expert_parallel import make_groups

        make_groups(config.moe.expert_parallel)
    sharded = world.size > 1 and config.train.zero_stage == 3
    with in_shares(world.rank, world.size) if sharded else nullcontext():
        task = world.main_first(lambda: _build_task(config))
    move(task.model, world.device)
    return task


def _build_task(config: Config) -> AnyTask:
    try:
        return build_task(config)
    except OSError as error:
        if error.filename is None:
            raise
        raise ConfigError(
            f"{error.filename}: {error.strerror}: give a data.source that can be read, and a "
            "data.cache_dir that can be written"
        ) from None
