"""What a run writes down: averages of steps, usage, banks, speed, held-out measures and samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np

from simvq_moe.config.schema import Config
from simvq_moe.core.usage import counters
from simvq_moe.costs.flops import cost_of, peak_memory
from simvq_moe.engine.agreement import WriteFailed, writing
from simvq_moe.engine.devices import device_peak
from simvq_moe.engine.sharding import ready
from simvq_moe.engine.step_phases import Phases
from simvq_moe.engine.world import World
from simvq_moe.files.regular import write_atomically
from simvq_moe.records.bank_metrics import Banks
from simvq_moe.records.run_log import RunLog
from simvq_moe.records.step_averages import StepAverages, of_other_ranks
from simvq_moe.records.trackers.ids import ids_of_run, known_ids
from simvq_moe.records.usage_metrics import layers_of, usage_metrics
from simvq_moe.runs.checkpoint import LoopState, Restored
from simvq_moe.runs.folder import own_meta
from simvq_moe.tasks.registry import AnyTask
from simvq_moe.training.evaluation import evaluate, take_counts
from simvq_moe.training.latent_drift import LatentDrift
from simvq_moe.training.probe import Probe
from simvq_moe.training.step import StepOutcome


class HeldOut(NamedTuple):
    """What an evaluation has found."""

    measures: dict[str, float]
    counts: list[np.ndarray]
    """Draws of every layer."""


class Recorder:
    """The records of a run on this rank; rank 0 writes them.

    Args:
        config: the run's.
        task: the live model with its data, before the engine is built, which may take it apart.
        world: this rank among all.
    """

    def __init__(self, config: Config, task: AnyTask, world: World) -> None:
        self.config, self.task, self.world = config, task, world
        self.counters = counters(task.model)
        self.banks = Banks(task.model, self.counters)
        self.peak = config.train.peak_flops or device_peak(world.device, config.train.dtype)
        self.cost = cost_of(task.model, config, world.size, run_samples=bool(self.peak))
        self.phases = Phases(world.device)
        self.averages = StepAverages()
        """Averages of the steps since the last logged one."""
        self.train_seconds = 0.0
        self.unwritten: WriteFailed | None = None
        """What kept records from being written: it ends the run where ranks agree the next time."""
        self.log: RunLog | None = None

    def open(self, step: int) -> None:
        """Follow the model from this step on; nothing is written."""
        self.layers = layers_of(self.counters)
        self.probe = Probe(self.task, self.config.train, self.world, self.config.run_dir, step)
        self.known_ids = known_ids(own_meta(self.config.run_dir))
        self.tracker_ids = ids_of_run(self.config.train.trackers, self.known_ids)
        self.drift = LatentDrift(self.task, self.world.device)

    def begin(self, step: int) -> None:
        """Begin, or go on with, the files of the records; rank 0's alone.

        Raises:
            WriteFailed: they can't be written.
        """
        with writing(f"records of {self.config.run_dir}"):
            for name, content in self.task.files_to_keep().items():
                write_atomically(self.config.run_dir / name, content)
            steps = self.config.train.steps
            self.log = RunLog(
                self.config.run_dir,
                self.layers,
                step,
                steps=steps,
                config=self.config,
                tracker_ids=self.tracker_ids,
                known=self.known_ids,
            )

    def before_logged_step(self) -> None:
        """The step that comes is the last one of a line of the log."""
        self.banks.mark()
        self.drift.mark()

    def add(self, outcome: StepOutcome) -> None:
        """Add a step that the engine took."""
        self.averages.add(outcome.terms)
        self.averages.steps += 1

    def add_seconds(self, seconds: float) -> None:
        """Add the time of a step, taken or not."""
        self.averages.seconds += seconds
        self.train_seconds += seconds

    @property
    def has_steps(self) -> bool:
        """Whether there is anything to say: of steps that were all skipped there is nothing."""
        return self.averages.steps > 0

    def evaluate(self, step: int) -> HeldOut:
        """Held-out measures of the model; all ranks call it together."""
        with ready(self.task.model):
            measures, counts = evaluate(self.task, self.world, self.config.train.eval_batch_size)
            return HeldOut(measures | self.probe.measure(step), counts)

    def write(
        self, step: int, engine_metrics: Mapping[str, float], held_out: HeldOut | None
    ) -> dict[str, float]:
        """Write a line of the log, over all ranks, and begin the next one; all ranks call it.

        Args:
            engine_metrics: what the engine alone knows of the steps.
            held_out: the evaluation at this step, if there was one.
        """
        self.averages.take(self.phases)
        metrics = {"time": self.train_seconds} | self.averages.means(self.world)
        counts = take_counts(self.counters, self.world)
        metrics |= engine_metrics
        metrics |= usage_metrics(self.layers, counts)
        metrics |= self.banks.measure(
            counts, self.averages.steps, self.world, spectra=held_out is not None
        )
        metrics |= self.drift.measure()
        metrics |= self._speed()
        self.averages = StepAverages()
        measures, held_out_counts = held_out or ({}, None)
        samples = self.task.samples(step, self.world.device) if held_out else None
        if self.log is not None:
            with self._noting_failure():
                self.log.write(step, metrics | measures, counts, held_out_counts)
                if held_out is not None:
                    self.log.write_spectra(self.banks.spectra)
                if samples is not None:
                    self.log.write_pictures(step, self.probe.pictures(), self.probe.rows)
                    samples.write(self.log, step)
        return metrics

    def summary(self, step: int) -> dict[str, float]:
        """The last numbers of a run beside its held-out measures."""
        return self.probe.saturations() | {
            "step": float(step),
            "time/train_s": self.train_seconds,
            "speed/tokens_per_s": self._tokens(step) / max(self.train_seconds, 1e-9),
            "memory/peak_mib": peak_memory(self.world.device) / 2**20,
        }

    def flush(self) -> None:
        """Write what is written with checkpoints alone."""
        if self.log is not None:
            with self._noting_failure():
                self.log.write_usage()
                self.probe.write()

    def check_written(self) -> None:
        """Raise `WriteFailed` where something could not be written."""
        if self.unwritten is not None:
            raise self.unwritten

    def close(self) -> None:
        """Finish the records, also after a failure."""
        if self.log is not None:
            # each checkpoint has written them; a full disk has been reported
            with suppress(OSError):
                self.probe.write()
            with suppress(OSError):
                self.log.close()

    def state(self) -> LoopState:
        self.averages.take(self.phases)
        shared = {"train_seconds": self.train_seconds, "stale": self.banks.state()}
        counts = [counter.counts for counter in self.counters]
        return LoopState(shared, {"window": self.averages.state(), "counts": counts})

    def take_up(self, restored: Restored) -> None:
        self.train_seconds = restored.shared["train_seconds"]
        self.banks.take_up(restored.shared["stale"])
        own = restored.own
        kept = own[0] if restored.same_ranks else of_other_ranks(own, self.world)
        self.averages = StepAverages(**kept["window"])
        for counter, counts in zip(self.counters, kept["counts"], strict=True):
            counter.counts.copy_(counts)

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        """What can't be written ends the run where all ranks agree the next time, not here."""
        try:
            with writing(f"records of {self.config.run_dir}"):
                yield
        except WriteFailed as failure:
            self.unwritten = failure

    def _speed(self) -> dict[str, float]:
        """Tokens a second since the last line, and their share of the peak of all devices, where
        that is known: model FLOPs utilization (PaLM, arXiv:2204.02311, appendix B)."""
        tokens_per_s = self._tokens(self.averages.steps) / self.averages.seconds
        speed = {"speed/tokens_per_s": tokens_per_s}
        if self.peak:
            flops_per_s = tokens_per_s * self.cost["flops_per_token"]
            speed["speed/mfu"] = flops_per_s / (self.peak * self.world.size)
        return speed | {"memory/peak_mib": peak_memory(self.world.device) / 2**20}

    def _tokens(self, steps: int) -> int:
        return steps * self.config.train.batch_size * self.task.tokens_per_sample
