"""The training loop: one DeepSpeed engine, any number of ranks, exact to resume.

A step's global batch follows from the seed and the step alone, and each rank takes its share, so
the position is the step number. All ranks agree at every step whether to go on: a signal or a
non-finite loss on one of them stops all, and what a bad step did is never saved.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from simvq_moe.config import Config
from simvq_moe.core.nearest import NotFiniteError
from simvq_moe.core.usage import counters
from simvq_moe.data.order import BatchOrder
from simvq_moe.merging import ConfigError
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.moe.after_step import after_step
from simvq_moe.training import checkpoint
from simvq_moe.training.banks import Banks
from simvq_moe.training.cost import cost_of
from simvq_moe.training.engine import World, make_engine
from simvq_moe.training.evaluation import evaluate, take_counts
from simvq_moe.training.logs import RunLog
from simvq_moe.training.measures import layers_of, usage_metrics
from simvq_moe.training.probe import Probe
from simvq_moe.training.progress import Progress
from simvq_moe.training.tasks import SAMPLES, TOKENIZER, Task, build_task, source_of


class TrainingFailed(RuntimeError):
    """The run can't go on; one line says why and what was saved."""


class Interrupted(Exception):
    """A signal asked to stop; a checkpoint was saved."""


class Trainer:
    """One run of one config on this rank.

    Args:
        config: what to train; its run folder exists.
        world: this rank among all.
        stop_asked: whether a signal has asked this process to stop.
    """

    def __init__(self, config: Config, world: World, stop_asked: Callable[[], bool]) -> None:
        self.config, self.world, self.stop_asked = config, world, stop_asked
        self.began = time.monotonic()
        self.task = _build_in_turn(config, world)
        self.step = 0
        self.order = BatchOrder(
            examples=len(self.task.train), batch=config.train.batch_size, seed=config.seed
        )
        if self.task.start is not None:
            # before the engine, which copies the parameters
            self.task.start(self._batch(self._shares().flatten()))
        self.counters = counters(self.task.model)
        self.banks = Banks(self.task.model, self.counters)
        self.cost = cost_of(self.task.model, config, world.size)
        self.engine = make_engine(self.task.model, config, world)
        if config.train.compile:
            assert isinstance(self.task.model, LanguageModel)
            self.task.model.compile_blocks()  # after the engine, which sets the precision
        self.layers = layers_of(self.counters)
        self.checkpoints = config.run_dir / "checkpoints"
        self.train_seconds = 0.0
        self.window = Window()
        restored = checkpoint.restore(self.engine, self.checkpoints, world, config.seed)
        if restored is not None:
            self._take_up(restored)
        elif self.task.tokenizer is not None and world.is_main:
            shutil.copyfile(self.task.tokenizer, config.run_dir / TOKENIZER)
        self.resumed_from = self.step
        self.probe = Probe(self.task, config.train, world, config.run_dir, self.step)
        self.log = RunLog(config.run_dir, self.layers, self.step) if world.is_main else None

    def run(self) -> dict[str, float]:
        """Train to the last step; the final held-out measures and the cost.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint was saved.
            TrainingFailed: a loss or a gradient is not finite.
        """
        train = self.config.train
        progress = Progress(train.steps, self.step)
        held_out: dict[str, float] = {}
        while self.step < train.steps:
            stop = self._update()
            last = self.step == train.steps
            evaluated = None
            if last or self.step % train.eval_every == 0:
                evaluated = held_out, _ = self._evaluate()
            if self._is_logged(self.step):
                metrics = self._write_log(evaluated)
                if self.world.is_main:
                    progress.show(self.step, metrics)
            if last or stop or self.step % train.save_every == 0:
                self._save()
            if stop and not last:
                raise Interrupted(f"stopped at step {self.step}, which is saved")
        return (
            (held_out or self._evaluate()[0])
            | self.probe.saturations()
            | {
                "step": float(self.step),
                "time/train_s": self.train_seconds,
                "time/wall_s": time.monotonic() - self.began,
                "speed/tokens_per_s": self._tokens(self.step) / max(self.train_seconds, 1e-9),
            }
        )

    def close(self) -> None:
        """Finish the records, also after a failure."""
        if self.log is not None:
            self.log.close()
            self.probe.write()

    def _is_logged(self, step: int) -> bool:
        train = self.config.train
        return step == train.steps or step % train.log_every == 0 or step % train.eval_every == 0

    def _update(self) -> bool:
        """One optimizer step over this rank's share of the global batch; whether to stop after."""
        if self._is_logged(self.step + 1):
            self.banks.mark()
        started = time.monotonic()
        self.engine.train()
        parts = self.config.train.accumulation
        agreement = Agreement(self.world)
        for i, part in enumerate(self._shares()):
            loss, terms = self._forward(part)
            self.window.add({"loss": loss, **terms}, 1 / parts)
            if i == parts - 1:
                agreement.ask(self.stop_asked(), self.window.sums["loss"])
            self.engine.backward(loss)
            self.engine.step()
        after_step(self.task.model)
        stop, finite = agreement.answer()
        if not finite:
            raise TrainingFailed(f"step {self.step + 1}: loss not finite; {self._last_good()}")
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(norm):
            raise TrainingFailed(f"step {self.step + 1}: gradient norm {norm}; {self._last_good()}")
        self.window.add({"grad_norm": torch.tensor(norm, device=self.world.device)}, 1.0)
        self.step += 1
        self.window.steps += 1
        self.window.seconds += time.monotonic() - started
        self.train_seconds += time.monotonic() - started
        return stop

    def _shares(self) -> np.ndarray:
        """This rank's indices of each micro-batch of the step, (accumulation, samples).

        Ranks share every micro-batch, so that it is the same one whatever their number.
        """
        indices = self.order.indices(self.step)
        shape = (self.config.train.accumulation, self.world.size, -1)
        return indices.reshape(shape)[:, self.world.rank]

    def _batch(self, indices: np.ndarray) -> Tensor:
        return self.task.train.batch(indices).to(self.world.device)

    def _forward(self, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            return self.engine(self._batch(indices))
        except NotFiniteError:
            # a loss of every parameter, so that this rank makes the same collective calls as others
            parameters = [p.sum() for p in self.task.model.parameters() if p.requires_grad]
            return math.nan * torch.stack(parameters).sum(), {}

    def _last_good(self) -> str:
        step = checkpoint.latest_step(self.checkpoints)
        saved = (
            "no checkpoint yet" if step is None else f"checkpoint {self.checkpoints / str(step)}"
        )
        return (
            f"step {self.step} was the last good one ({saved}); lower optimizer.lr or set "
            "train.clip, with another --name"
        )

    def _evaluate(self) -> tuple[dict[str, float], list[np.ndarray]]:
        measures, counts = evaluate(self.task, self.world, self.config.train.eval_batch_size)
        return measures | self.probe.measure(self.step), counts

    def _write_log(
        self, evaluated: tuple[dict[str, float], list[np.ndarray]] | None
    ) -> dict[str, float]:
        """Close the window: its means and counts over all ranks, written by rank 0."""
        names = sorted(self.window.sums)
        sums = torch.stack([self.window.sums[name] for name in names]) / self.window.steps
        means = (self.world.sum(sums) / self.world.size).tolist()
        counts = take_counts(self.counters, self.world)
        metrics = {"time": self.train_seconds}
        metrics |= {f"train/{name}": mean for name, mean in zip(names, means, strict=True)}
        metrics["train/lr"] = self.engine.get_lr()[0]
        metrics |= usage_metrics(self.layers, counts)
        metrics |= self.banks.measure(counts, self.window.steps, self.world)
        metrics["speed/tokens_per_s"] = self._tokens(self.window.steps) / self.window.seconds
        self.window = Window()
        held_out, held_out_counts = evaluated or ({}, None)
        if self.log is not None:
            self.log.write(self.step, metrics | held_out, counts, held_out_counts)
            if evaluated:
                self.log.write_pictures(self.step, self.probe.pictures(), self.probe.rows)
        if evaluated:
            self._write_samples()
        return metrics

    @torch.no_grad()
    def _write_samples(self) -> None:
        if self.task.continuations is not None:
            # on every rank, for they may share experts
            written = self.task.continuations(self.step)
            if self.log is not None:
                self.log.write_text(self.step, written)
        if self.log is None or (self.task.picture is None and self.task.sounds is None):
            return
        self.engine.eval()
        shown = min(SAMPLES, len(self.task.held_out))
        every = len(self.task.held_out) // shown
        batch = self.task.held_out.batch(np.arange(shown) * every).to(self.world.device)
        if self.task.picture is not None:
            self.log.write_samples(self.step, self.task.picture(batch))
        if self.task.sounds is not None:
            self.log.write_sounds(self.step, self.task.sounds(batch), self.task.sample_rate)

    def _save(self) -> None:
        if self.log is not None:
            self.log.write_usage()
            self.probe.write()
        shared = {
            "data_digest": self.task.data_digest,
            "train_seconds": self.train_seconds,
            "stale": self.banks.state(),
        }
        own = {
            "window": self.window.state(),
            "counts": [counter.counts for counter in self.counters],
        }
        where = (self.engine, self.checkpoints, self.step, self.world)
        checkpoint.save(*where, self.config.train, shared=shared, own=own)

    def _take_up(self, restored: checkpoint.Restored) -> None:
        shared = restored.shared
        if shared["data_digest"] != self.task.data_digest:
            raise ConfigError(
                f"the data in data.source {source_of(self.config)!r} are not those that "
                f"{self.config.run_dir} began with: put them back, or give the run another --name"
            )
        self.step = restored.step
        self.train_seconds = shared["train_seconds"]
        self.banks.take_up(shared["stale"])
        own = _of_this_rank(restored.own, self.world)
        self.window = Window(**own["window"])
        for counter, counts in zip(self.counters, own["counts"], strict=True):
            counter.counts.copy_(counts)

    def _tokens(self, steps: int) -> int:
        return steps * self.config.train.batch_size * self.task.tokens_per_sample


class Agreement:
    """All ranks learn whether one was asked to stop or has a loss that is not finite.

    The exchange goes on during the backward pass. An update from a loss that is not finite is
    never saved: the run ends before the next checkpoint.
    """

    def __init__(self, world: World) -> None:
        self.world = world

    def ask(self, stop: bool, loss: Tensor) -> None:
        """Tell the others; every rank must."""
        finite = loss.detach().isfinite().to(torch.int32).reshape(())
        self.flags = torch.stack([torch.full_like(finite, stop), 1 - finite])
        self.pending = dist.all_reduce(self.flags, async_op=True) if self.world.size > 1 else None

    def answer(self) -> tuple[bool, bool]:
        """Whether to stop after this step, and whether every rank's loss is finite."""
        if self.pending is not None:
            self.pending.wait()
        asked, not_finite = self.flags.tolist()
        return asked > 0, not_finite == 0


class Window:
    """Sums since the last logged step; part of a checkpoint, so that a resumed window is whole."""

    def __init__(
        self, steps: int = 0, seconds: float = 0.0, sums: dict[str, Tensor] | None = None
    ) -> None:
        self.steps, self.seconds = steps, seconds
        self.sums = sums or {}

    def add(self, terms: Mapping[str, Tensor], weight: float) -> None:
        """Add scalars by name; they stay on the device."""
        for name, value in terms.items():
            value = value.detach().double() * weight
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "seconds": self.seconds, "sums": self.sums}


def _of_this_rank(ranks: Sequence[Mapping[str, Any]], world: World) -> Mapping[str, Any]:
    """What this rank has kept; of another number of ranks, what leaves means of the window and
    sums of the counts over ranks as they were."""
    if len(ranks) == world.size:
        return ranks[world.rank]
    windows, by_counter = [rank["window"] for rank in ranks], [rank["counts"] for rank in ranks]
    sums = {
        name: torch.stack([window["sums"][name] for window in windows]).mean()
        for name in windows[0]["sums"]
    }
    counts = [
        torch.stack(counts).sum(0) * int(world.is_main) for counts in zip(*by_counter, strict=True)
    ]
    return {"window": windows[0] | {"sums": sums}, "counts": counts}


def _build_in_turn(config: Config, world: World) -> Task:
    """Rank 0 first: what is derived from the data once is then there for the others."""
    if config.moe.expert_parallel > 1:
        # all ranks at once, not in turn
        from simvq_moe.moe.expert_parallel import make_groups

        make_groups(config.moe.expert_parallel)
    if not world.is_main:
        world.barrier()
    task = build_task(config)
    if world.is_main:
        world.barrier()
    task.model.to(world.device)
    return task
