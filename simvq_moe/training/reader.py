"""The batches of a run: this rank's share of each step, where its data stand, and broken data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from simvq_moe.config.schema import Config
from simvq_moe.data.order import BatchOrder, Share, StepBatches
from simvq_moe.data.prefetch import Prefetched
from simvq_moe.data.rows.base import CorruptDataError
from simvq_moe.data.text.streaming import TextStream
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.runs.checkpoint import LoopState, Restored
from simvq_moe.tasks.registry import AnyTask


class BatchReader:
    """Reads the micro-batches of one step after the other, some of them ahead.

    Args:
        config: says how samples make a batch.
        task: has the training set.
        world: this rank among all.
    """

    def __init__(self, config: Config, task: AnyTask, world: World) -> None:
        self.config, self.task, self.world = config, task, world
        self.position: dict[int, Any] = {}
        """Where streams stand after the step that was read last; other data need no position."""
        self.broken: CorruptDataError | None = None
        """What kept the last step from being read."""
        self.batches: Prefetched[StepBatches] | None = None

    def first_batch(self) -> Tensor:
        """This rank's part of the first step, which a run reads again."""
        self.batches = Prefetched(self._steps_from(0), 0)
        batch = torch.cat(self.read())
        self.position = {}
        return batch

    def open(self, step: int) -> None:
        """Begin to read the steps after this one."""
        steps = self._steps_from(step)
        if self.world.device.type == "cuda":
            steps = map(_pinned, steps)
        self.batches = Prefetched(steps, self.config.data.prefetch)

    def read(self) -> list[Tensor]:
        """The micro-batches of the next step; where they are broken, others of their shape, so that
        this rank makes the same collective calls as the others."""
        assert self.batches is not None
        try:
            found = next(self.batches)
        except CorruptDataError as error:
            self.broken = error
            parts = self.config.train.accumulation
            samples = self.config.train.batch_size // (parts * self.world.size)
            shape = (samples, self.config.data.context + 1)
            return [torch.zeros(shape, dtype=torch.int64) for _ in range(parts)]
        self.position = found.position
        return found.micro_batches

    def close(self) -> None:
        """Read no more."""
        if self.batches is not None:
            self.batches.close()

    def state(self) -> LoopState:
        return LoopState({"data_digest": self.task.data_digest}, {"lanes": self.position})

    def take_up(self, restored: Restored) -> None:
        """Go on where the ranks of a checkpoint stood, however many they were.

        Raises:
            ConfigError: on every rank, if the data of one are not those of the checkpoint.
        """
        self.world.agree(lambda: self._check_data(restored.shared["data_digest"]))
        # checkpoints of before there were streams have none
        self.position = {k: v for rank in restored.own for k, v in rank.get("lanes", {}).items()}

    def _steps_from(self, step: int) -> Iterator[StepBatches]:
        train, data = self.config.train, self.task.train
        share = Share(train.batch_size, train.accumulation, self.world.rank, self.world.size)
        if isinstance(data, TextStream):
            return data.batches(share, self.position)
        order = BatchOrder(examples=len(data), batch=share.batch, seed=self.config.seed)
        return order.batches(data, share, step)

    def _check_data(self, digest: str) -> None:
        if digest != self.task.data_digest:
            raise ConfigError(
                f"the data in data.source {self.task.source(self.config)!r} are not those that "
                f"{self.config.run_dir} began with, or were held out otherwise: put them back, or "
                "give the run another --name"
            )


def _pinned(step: StepBatches) -> StepBatches:
    """The batches in memory that a GPU copies from while the process goes on."""
    return step._replace(micro_batches=[batch.pin_memory() for batch in step.micro_batches])
