"""What ends a run, and how all ranks learn of it: failures to write, numbers that are not finite.

One rank's full disk is every rank's failure: ranks that went on alone would wait for it for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from simvq_moe.core.state import held_tensors
from simvq_moe.engine.world import World

T = TypeVar("T")


class TrainingFailed(RuntimeError):
    """The run can't go on; one line says why and what was saved."""


class Interrupted(Exception):
    """A signal asked to stop; a checkpoint was saved."""


class WriteFailed(RuntimeError):
    """Something could not be written; one line says what, where and why."""


@contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Name what could not be written, because the system names no file when a disk is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise WriteFailed(f"{what} could not be written: {reason}") from error


def together(world: World, work: Callable[[], T]) -> list[T]:
    """What every rank's work returned; all ranks must call it, and raise if one could not write.

    Work makes no collective calls, because others would wait for them.

    Raises:
        WriteFailed: on every rank, with what each that failed has to say.
    """
    result: T | None = None
    failure = None
    try:
        result = work()
    except WriteFailed as error:
        failure = str(error) if world.size == 1 else f"rank {world.rank}: {error}"
    found = world.gather((result, failure))
    failures = [failure for _, failure in found if failure is not None]
    if failures:
        raise WriteFailed("; ".join(failures))
    return [result for result, _ in found]  # pyright: ignore[reportReturnType]


def said_by_any(world: World, error: Exception | None) -> str:
    """What each rank with an error has to say; all ranks must call it."""
    said = None if error is None else f"rank {world.rank}: {error}"
    if world.size == 1:
        return str(error or "")
    return "; ".join(each for each in world.gather(said) if each is not None)


def is_lost_rank(error: Exception) -> bool:
    """Whether a collective call failed because a connection ended: a rank was killed, or its
    machine has gone. Words of gloo and of NCCL."""
    ends = ("by peer", "Broken pipe", "remote process exited")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ends)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or this process, has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # PyTorch's allocator on the CPU raises nothing of its own
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class Agreement:
    """All ranks learn whether one was asked to stop, has a loss that is not finite, or failed.

    The exchange goes on during the backward pass.
    """

    def __init__(self, world: World) -> None:
        self.world = world

    def ask(self, stop: bool, loss: Tensor, failed: bool) -> None:
        """Tell the others; every rank must."""
        finite = loss.detach().isfinite().to(torch.int32).reshape(())
        told = (torch.full_like(finite, stop), 1 - finite, torch.full_like(finite, failed))
        self.flags = torch.stack(told)
        self.pending = dist.all_reduce(self.flags, async_op=True) if self.world.size > 1 else None

    def answer(self) -> tuple[bool, bool, bool]:
        """Whether to stop after this step, whether every loss is finite, and whether one failed."""
        if self.pending is not None:
            self.pending.wait()
        asked, not_finite, failed = self.flags.tolist()
        return asked > 0, not_finite == 0, failed > 0


class Undo:
    """Puts a model's buffers and what its modules hold back as they were before a step: moving
    averages, counts, sums.

    Parameters need no copy, because the engine leaves out a step whose gradient is not finite.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buffers = [*model.buffers(), *held_tensors(model)]
        self.kept = [buffer.clone() for buffer in self.buffers]
        self.versions = [buffer._version for buffer in self.buffers]

    @torch.no_grad()
    def mark(self) -> None:
        """This is the state to go back to; copies what has changed since the last call."""
        for i in self._changed():
            self.kept[i].copy_(self.buffers[i])
            self.versions[i] = self.buffers[i]._version

    @torch.no_grad()
    def undo(self) -> None:
        """Go back to the last mark."""
        for i in self._changed():
            self.buffers[i].copy_(self.kept[i])
            self.versions[i] = self.buffers[i]._version

    def _changed(self) -> list[int]:
        # torch counts every change in place
        pairs = enumerate(zip(self.buffers, self.versions, strict=True))
        return [i for i, (buffer, version) in pairs if buffer._version != version]
