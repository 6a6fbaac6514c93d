"""The training loop: one DeepSpeed engine, any number of ranks, exact to resume.

A step's global batch follows from the seed and the step alone, and each rank takes its share, so
the position is the step number. All ranks agree at every step whether to go on: a signal, a loss
that is not finite or a full disk on one of them stops all, and what a bad step did is never saved.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simvq_moe.config.loading import ConfigError, to_yaml
from simvq_moe.config.schema import Config
from simvq_moe.core.nearest import NotFiniteError
from simvq_moe.core.step_state import after_step, drop_step, follow_steps, followers
from simvq_moe.core.usage import counters
from simvq_moe.costs.flops import cost_of, peak_memory
from simvq_moe.data.documents import CorruptDataError
from simvq_moe.data.order import BatchOrder, Share, StepBatches
from simvq_moe.data.prefetch import Prefetched
from simvq_moe.data.streaming import TextStream
from simvq_moe.engine.agreement import (
    Agreement,
    Interrupted,
    TrainingFailed,
    Undo,
    WriteFailed,
    said_by_any,
    together,
    writing,
)
from simvq_moe.engine.build import make_engine
from simvq_moe.engine.devices import device_peak
from simvq_moe.engine.sharding import ready
from simvq_moe.engine.step_phases import Phase, Phases, profiled
from simvq_moe.engine.world import World
from simvq_moe.files.regular import write_atomically
from simvq_moe.records.bank_metrics import Banks
from simvq_moe.records.progress import Progress
from simvq_moe.records.run_log import RunLog
from simvq_moe.records.step_averages import Window, of_this_rank
from simvq_moe.records.usage_metrics import layers_of, usage_metrics
from simvq_moe.runs import checkpoint
from simvq_moe.tasks.registry import AnyTask, build_task, source_of
from simvq_moe.tasks.text import TOKENIZER
from simvq_moe.training.evaluation import evaluate, take_counts
from simvq_moe.training.probe import Probe
from simvq_moe.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

SKIPPED_IN_A_ROW = 10
"""Steps, after which a run that skips them ends."""


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
        self.task = _build(config, world)
        self.step = 0
        self.position: dict[int, Any] = {}
        self.unread: CorruptDataError | None = None
        if self.task.starts_from_data:
            self.reader = Prefetched(self._batches(), 0)
            # before the engine, which copies the parameters
            self.task.start(torch.cat(self._read()).to(world.device))
            self.position = {}
        self.counters = counters(self.task.model)
        follow_steps(self.task.model)
        self.has_step_state = bool(followers(self.task.model))
        self.banks = Banks(self.task.model, self.counters)
        self.peak = config.train.peak_flops or device_peak(world.device, config.train.dtype)
        self.cost = cost_of(self.task.model, config, world.size, run_samples=bool(self.peak))
        self.engine = make_engine(self.task.model, config, world)
        if config.train.compile:
            self.task.compile()  # after the engine, which sets the precision
        self.layers = layers_of(self.counters)
        self.checkpoints = config.run_dir / "checkpoints"
        self.train_seconds = 0.0
        self.window = Window()
        self.phases = Phases(world.device)
        restored = checkpoint.restore(self.engine, self.checkpoints, world, config.seed)
        if restored is not None:
            self._take_up(restored)
        self.resumed_from = self.step
        self.reader = Prefetched(self._batches(), config.data.prefetch)
        self.probe = Probe(self.task, config.train, world, config.run_dir, self.step)
        self.log: RunLog | None = None
        together(world, lambda: self._begin_records(begin) if world.is_main else None)
        self.unwritten: WriteFailed | None = None
        # fp16 leaves out steps as well, until the scale of the loss is right
        skips = config.train.on_not_finite == "skip" or config.train.dtype == "fp16"
        self.undo = Undo(self.task.model) if skips else None
        self.skipped_in_a_row = 0
        self.watchdog = Watchdog(config.run_dir, world, config.train.timeout_s)

    def _begin_records(self, begin: Callable[[Trainer], None] | None) -> None:
        if begin is not None:
            begin(self)
        with writing(f"records of {self.config.run_dir}"):
            if self.task.tokenizer is not None:
                write_atomically(self.config.run_dir / TOKENIZER, self.task.tokenizer.read_bytes())
            self.log = RunLog(self.config, self.layers, self.step)

    def run(self) -> dict[str, float]:
        """Train to the last step; the final held-out measures and the cost.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint was saved.
            TrainingFailed: a loss or a gradient is not finite, or something can't be written.
        """
        self.watchdog.start(self.step + 1)
        traced = self.config.train.profile and self.world.is_main
        folder = self.config.run_dir / "profile" if traced else None
        with self.phases.collectives_timed(), profiled(folder) as step_done:
            return self._run(step_done)

    def _run(self, step_done: Callable[[], None]) -> dict[str, float]:
        train = self.config.train
        progress = Progress(train.steps, self.step)
        held_out: dict[str, float] = {}
        while self.step < train.steps:
            stop = self._update()
            step_done()
            last = self.step == train.steps
            evaluated = None
            if last or self.step % train.eval_every == 0:
                evaluated = held_out, _ = self._evaluate()
            # of steps that were all skipped there is nothing to say
            if self._is_logged(self.step) and self.window.steps:
                metrics = self._write_log(evaluated)
                if self.world.is_main:
                    progress.show(self.step, metrics)
            if last or stop or self.step % train.save_every == 0:
                self._save()
            if stop and not last:
                raise Interrupted(
                    f"stopped at step {self.step}, which is saved; the same command goes on"
                )
        return (
            (held_out or self._evaluate()[0])
            | self.probe.saturations()
            | {
                "step": float(self.step),
                "time/train_s": self.train_seconds,
                "time/wall_s": time.monotonic() - self.began,
                "speed/tokens_per_s": self._tokens(self.step) / max(self.train_seconds, 1e-9),
                "memory/peak_mib": peak_memory(self.world.device) / 2**20,
            }
        )

    def close(self) -> None:
        """Finish the records, also after a failure."""
        self.watchdog.stop()
        self.reader.close()
        if self.log is not None:
            # each checkpoint has written them; a full disk has been reported
            with suppress(OSError):
                self.probe.write()
            with suppress(OSError):
                self.log.close()

    def _is_logged(self, step: int) -> bool:
        train = self.config.train
        return step == train.steps or step % train.log_every == 0 or step % train.eval_every == 0

    def _update(self) -> bool:
        """One optimizer step over this rank's share of the global batch; whether to stop after."""
        if self._is_logged(self.step + 1):
            self.banks.mark()
        started = time.monotonic()
        if not self.task.model.training:  # after an evaluation; to set it costs 1 % of a small step
            self.engine.train()
        if self.undo is not None:
            self.undo.mark()
        parts = self.config.train.accumulation
        agreement, sums = Agreement(self.world), Window()
        with self._phase("data"):
            micro_batches = self._read()
        for i, micro_batch in enumerate(micro_batches):
            with self._phase("data"):
                batch = micro_batch.to(self.world.device)
            with self._phase("forward"):
                loss, terms = self._forward(batch)
            sums.add({"loss": loss, **terms}, 1 / parts)
            if i == parts - 1:
                failed = self.unwritten is not None or self.unread is not None
                agreement.ask(self.stop_asked(), sums.sums["loss"], failed)
            with self._phase("backward"):
                self.engine.backward(loss)
            with self._phase("optimizer"):
                self.engine.step()
        with self._phase("communication"):
            stop, finite, failed = agreement.answer()
        if failed:
            unread = said_by_any(self.world, self.unread)
            raise TrainingFailed(self._not_read(unread) or self._not_saved(self.unwritten))
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        if finite and math.isfinite(norm):
            with self._phase("optimizer"):
                if self.has_step_state:
                    after_step(self.task.model)
            sums.add({"grad_norm": torch.tensor(norm, device=self.world.device)})
            self.window.add(sums.sums)
            self.window.steps += 1
            self.skipped_in_a_row = 0
        else:
            self._leave_out(finite, norm)
        self.step += 1
        self.window.seconds += time.monotonic() - started
        self.train_seconds += time.monotonic() - started
        return stop

    def _phase(self, phase: Phase) -> AbstractContextManager[None]:
        self.watchdog.move(self.step + 1, phase)
        return self.phases.phase(phase)

    def _leave_out(self, finite: bool, norm: float) -> None:
        """Undo a step that the engine did not take, or end the run."""
        what = f"gradient norm {norm}" if finite else "loss not finite"
        if self.undo is None or (not finite and self.config.train.on_not_finite == "stop"):
            raise TrainingFailed(f"step {self.step + 1}: {what}; {self._last_good()}")
        self.undo.undo()
        drop_step(self.task.model)
        if finite and self.engine.fp16_enabled():
            return
        if self.skipped_in_a_row + 1 == SKIPPED_IN_A_ROW:
            raise TrainingFailed(
                f"steps up to {self.step + 1}: {what}, {SKIPPED_IN_A_ROW} skipped in a row; "
                f"{self._last_good()}"
            )
        self.skipped_in_a_row += 1
        if self.world.is_main:
            skipped = self.engine.skipped_steps
            logger.warning("step %d is skipped: %s (%d so far)", self.step + 1, what, skipped)

    def _batches(self) -> Iterator[StepBatches]:
        """This rank's batches of all steps from here on."""
        train, data = self.config.train, self.task.train
        share = Share(train.batch_size, train.accumulation, self.world.rank, self.world.size)
        if isinstance(data, TextStream):
            return data.batches(share, self.position)
        order = BatchOrder(examples=len(data), batch=share.batch, seed=self.config.seed)
        return order.batches(data, share, self.step)

    def _read(self) -> list[Tensor]:
        """The micro-batches of the next step; where they are broken, others of their shape, so that
        this rank makes the same collective calls as the others."""
        try:
            found = next(self.reader)
        except CorruptDataError as error:
            self.unread = error
            parts = self.config.train.accumulation
            samples = self.config.train.batch_size // (parts * self.world.size)
            shape = (samples, self.config.data.context + 1)
            return [torch.zeros(shape, dtype=torch.int64) for _ in range(parts)]
        self.position = found.position
        return found.micro_batches

    def _forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            loss, terms = self.engine(batch)
        except NotFiniteError:
            return self._not_a_number(batch), {}
        if self.config.train.on_not_finite == "skip":
            # the engine leaves out what has no finite gradient
            loss = loss * torch.where(loss.isfinite(), 1.0, math.nan)
        return loss, terms

    def _not_a_number(self, batch: Tensor) -> Tensor:
        """A loss of NaN, by which this rank makes the same collective calls as the others."""
        try:
            return math.nan * self.engine(torch.zeros_like(batch))[0]
        except NotFiniteError:
            # not the batch, then, but parameters, which are the others' as well
            parameters = [p.sum() for p in self.task.model.parameters() if p.requires_grad]
            return math.nan * torch.stack(parameters).sum()

    def _last_good(self) -> str:
        return (
            f"step {self.step - self.skipped_in_a_row} was the last good one ({self._saved()}); "
            "lower optimizer.lr or set train.clip, with another --name"
        )

    def _not_read(self, unread: str) -> str:
        return unread and f"step {self.step + 1}: {unread} (newest: {self._saved()})"

    def _not_saved(self, failure: WriteFailed | None) -> str:
        return (
            f"stopped at step {self.step}: {failure} (newest: {self._saved()}); make room, and the "
            "same command goes on"
        )

    def _saved(self) -> str:
        if not self.world.is_main:
            return ""  # it reads the files, and rank 0 is the one to tell
        step = checkpoint.latest_step(self.checkpoints)
        return "no checkpoint yet" if step is None else f"checkpoint {self.checkpoints / str(step)}"

    def _evaluate(self) -> tuple[dict[str, float], list[np.ndarray]]:
        self.watchdog.move(self.step, "evaluation")
        with ready(self.task.model):
            measures, counts = evaluate(self.task, self.world, self.config.train.eval_batch_size)
            return measures | self.probe.measure(self.step), counts

    def _write_log(
        self, evaluated: tuple[dict[str, float], list[np.ndarray]] | None
    ) -> dict[str, float]:
        """Close the window: its means and counts over all ranks, written by rank 0."""
        self.watchdog.move(self.step, "records")
        self.window.take(self.phases)
        metrics = {"time": self.train_seconds} | self.window.means(self.world)
        counts = take_counts(self.counters, self.world)
        metrics["train/lr"] = self.engine.get_lr()[0]
        if self.undo is not None:
            metrics["train/skipped_steps"] = float(self.engine.skipped_steps)
        metrics |= usage_metrics(self.layers, counts)
        metrics |= self.banks.measure(counts, self.window.steps, self.world)
        metrics |= self._speed()
        self.window = Window()
        held_out, held_out_counts = evaluated or ({}, None)
        samples = self.task.samples(self.step, self.world.device) if evaluated else None
        spectra = self.banks.spectra() if evaluated else {}
        if self.log is not None:
            with self._recording():
                self.log.write(self.step, metrics | held_out, counts, held_out_counts)
                self.log.write_spectra(spectra)
                if samples is not None:
                    self.log.write_pictures(self.step, self.probe.pictures(), self.probe.rows)
                    samples.write(self.log, self.step)
        return metrics

    def _speed(self) -> dict[str, float]:
        """Throughput of the window, and its share of the peak of all devices, where that is known:
        model FLOPs utilization (PaLM, arXiv:2204.02311, appendix B)."""
        tokens_per_s = self._tokens(self.window.steps) / self.window.seconds
        speed = {"speed/tokens_per_s": tokens_per_s}
        if self.peak:
            flops_per_s = tokens_per_s * self.cost["flops_per_token"]
            speed["speed/mfu"] = flops_per_s / (self.peak * self.world.size)
        return speed | {"memory/peak_mib": peak_memory(self.world.device) / 2**20}

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """What can't be written ends the run where all ranks agree the next time, not here."""
        try:
            with writing(f"records of {self.config.run_dir}"):
                yield
        except WriteFailed as failure:
            self.unwritten = failure

    def _check_records(self) -> None:
        if self.unwritten is not None:
            raise self.unwritten

    def _save(self) -> None:
        self.watchdog.move(self.step, "checkpoint")
        if self.log is not None:
            with self._recording():
                self.log.write_usage()
                self.probe.write()
        shared = {
            "data_digest": self.task.data_digest,
            "train_seconds": self.train_seconds,
            "stale": self.banks.state(),
        }
        self.window.take(self.phases)
        own = {
            "lanes": self.position,
            "window": self.window.state(),
            "counts": [counter.counts for counter in self.counters],
        }
        where = (self.engine, self.checkpoints, self.step, self.world)
        try:
            together(self.world, self._check_records)
            text = to_yaml(self.config)
            checkpoint.save(*where, self.config.train, shared=shared, own=own, config_yaml=text)
        except WriteFailed as failure:
            raise TrainingFailed(self._not_saved(failure)) from failure

    def _take_up(self, restored: checkpoint.Restored) -> None:
        shared = restored.shared
        self.world.agree(lambda: self._check_data(shared["data_digest"]))
        self.step = restored.step
        self.train_seconds = shared["train_seconds"]
        self.banks.take_up(shared["stale"])
        # checkpoints of before there were streams have none
        self.position = {k: v for own in restored.own for k, v in own.get("lanes", {}).items()}
        own = of_this_rank(restored.own, self.world)
        self.window = Window(**own["window"])
        for counter, counts in zip(self.counters, own["counts"], strict=True):
            counter.counts.copy_(counts)

    def _check_data(self, digest: str) -> None:
        if digest != self.task.data_digest:
            raise ConfigError(
                f"the data in data.source {source_of(self.config)!r} are not those that "
                f"{self.config.run_dir} began with, or were held out otherwise: put them back, or "
                "give the run another --name"
            )

    def _tokens(self, steps: int) -> int:
        return steps * self.config.train.batch_size * self.task.tokens_per_sample


def _build(config: Config, world: World) -> AnyTask:
    if config.moe.expert_parallel > 1:
        # all ranks at once, not in turn
        from simvq_moe.moe.expert_parallel import make_groups

        make_groups(config.moe.expert_parallel)
    task = world.main_first(lambda: _build_task(config))
    task.model.to(world.device)
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
