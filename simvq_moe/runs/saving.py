"""Checkpoints are written by all ranks at once, and by themselves if so configured.

Every rank writes into a temporary folder; once all have, rank 0 adds a manifest, renames the folder
and moves `latest`, a note for people. If one rank can't write, all learn of it, and what is half
written is removed. With `train.async_save` a thread does so with a copy of what is saved, in a
group of its own, while training goes on; until its folder has its name, the one before is used.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simvq_moe.config.schema import TrainConfig
from simvq_moe.engine.agreement import WriteFailed, together, writing
from simvq_moe.engine.world import World
from simvq_moe.files.regular import sync_folder, write_atomically
from simvq_moe.runs.checkpoint import (
    CONFIG,
    FORMAT,
    MANIFEST,
    SHARED,
    LoopState,
    committed_steps,
    step_named,
)
from simvq_moe.runs.chunks import INDEX

if TYPE_CHECKING:
    from simvq_moe.engine.pieces import Piece


@dataclass(frozen=True)
class Content:
    """What this rank writes of one checkpoint."""

    pieces: Sequence[Piece]
    others: Mapping[str, bytes]
    """Files other than those of tensors."""
    manifest: Mapping[str, Any]


class Saves:
    """The checkpoints that a run writes; all ranks call each method together.

    Args:
        folder: of checkpoints.
        world: this rank among all.
        config: says which checkpoints are kept, and whether training goes on meanwhile.
    """

    def __init__(self, folder: Path, world: World, config: TrainConfig) -> None:
        self.folder, self.config = folder, config
        self.thread = ThreadPoolExecutor(1, "checkpoint") if config.async_save else None
        self.world = world.aside(config.timeout_s) if config.async_save else world
        self.pending: Future[None] | None = None

    def begin(self, engine: Any, step: int, state: LoopState, config_yaml: str = "") -> None:
        """Save the run at this step as FOLDER/STEP, then delete what is not to be kept; with
        `async_save` training may go on once this returns, which waits for the save before.

        Args:
            state: of the training loop.
            config_yaml: the run's config, which says whose state this is.

        Raises:
            WriteFailed: on all ranks, if one can't write, say for a full disk, or could not write
                the one before; what was saved before is as it was.
        """
        self.finish()
        content = _content(engine, step, self.world, state, config_yaml)
        if self.thread is None:
            _write(content, self.folder, self.world, self.config)
        else:
            content = replace(content, pieces=copies(content.pieces))
            self.pending = self.thread.submit(_write, content, self.folder, self.world, self.config)

    def finish(self) -> None:
        """Wait until what was begun is saved.

        Raises:
            WriteFailed: on all ranks, if one could not write it.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    @property
    def failed(self) -> bool:
        """Whether this rank knows that what was begun could not be written; it alone may ask."""
        pending = self.pending
        return pending is not None and pending.done() and pending.exception() is not None

    def settle(self) -> None:
        """Wait until what was begun is saved or has failed; a rank alone may call it."""
        if self.pending is not None:
            wait([self.pending])

    def close(self) -> None:
        """Let what was begun come to its end, also after a failure elsewhere."""
        if self.thread is not None:
            self.thread.shutdown()


def _content(engine: Any, step: int, world: World, state: LoopState, config_yaml: str) -> Content:
    # these import deepspeed, which only training needs
    from simvq_moe.engine.pieces import held_pieces, own_share
    from simvq_moe.engine.state import counters

    share = own_share(held_pieces(engine))
    others: dict[str, bytes] = {
        f"rank_{world.rank}.pt": _serialized(state.own | {"rng": _rng_state(world.device)})
    }
    if world.is_main:
        others |= {SHARED: _serialized(state.shared), CONFIG: config_yaml.encode()}
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": world.size,
        "zero_stage": engine.zero_optimization_stage(),
        "counters": counters(engine),
    }
    return Content(share, others, manifest)


@torch.no_grad()
def copies(pieces: Sequence[Piece]) -> list[Piece]:
    """The same elements in host memory, pinned where they come from a GPU, so that all copies are
    under way at once; torch keeps pinned memory for the next save."""
    copies, on_gpu = [], False
    for piece in pieces:
        on_gpu |= piece.data.is_cuda
        data = torch.empty_like(piece.data, device="cpu", pin_memory=piece.data.is_cuda)
        copies.append(replace(piece, data=data.copy_(piece.data, non_blocking=True)))
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    return copies


def _write(content: Content, folder: Path, world: World, config: TrainConfig) -> None:
    from simvq_moe.runs.resharding import write_pieces

    manifest = dict(content.manifest)
    temporary = folder / f"{manifest['step']}.tmp"
    try:
        together(world, lambda: _make_room(temporary) if world.is_main else None)
        sizes: dict[str, Any] = {
            name: {"size": size}
            for name, size in write_pieces(temporary, content.pieces, world).items()
        }
        seals = together(world, lambda: sizes | _write_others(temporary, content.others, world))
        manifest["files"] = {name: seal for of_rank in seals for name, seal in of_rank.items()}
        together(world, lambda: _finish(temporary, manifest, config) if world.is_main else None)
    except WriteFailed:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _make_room(temporary: Path) -> None:
    with writing(temporary):
        for left_over in temporary.parent.glob("*.tmp"):
            if step_named(left_over.stem) is not None:  # others' files stay
                shutil.rmtree(left_over)
        temporary.mkdir(parents=True)
        sync_folder(temporary.parent.parent)


def _serialized(state: dict[str, Any]) -> bytes:
    # in memory, for of a full disk torch says no more than that writing failed
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _write_others(target: Path, others: Mapping[str, bytes], world: World) -> dict[str, Any]:
    """Write files other than those of tensors; seals of these, and of the index."""
    for name, content in others.items():
        with writing(target / name):
            write_atomically(target / name, content)
    seals = {name: _seal(content) for name, content in others.items()}
    if world.is_main:
        seals[INDEX] = _seal((target / INDEX).read_bytes())
    return seals


def _seal(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _finish(temporary: Path, manifest: dict[str, Any], config: TrainConfig) -> None:
    folder, step = temporary.parent, manifest["step"]
    with writing(folder / str(step)):
        _commit(temporary, folder / str(step), manifest)
        _clean_up(folder, step, config)


def _commit(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1))
    if final.exists():
        # a broken one: else the run would have gone on from there
        shutil.rmtree(final)
    temporary.rename(final)
    write_atomically(final.parent / "latest", final.name)  # and flushes both names


def _clean_up(folder: Path, step: int, config: TrainConfig) -> None:
    """Delete checkpoints that the config does not keep, and later ones, which were broken."""
    steps = committed_steps(folder)
    until_now = [s for s in steps if s <= step]
    kept = set(until_now[-config.keep_checkpoints :])
    if config.keep_every:
        kept |= {s for s in until_now if s % config.keep_every == 0}
    for old in sorted(set(steps) - kept):
        # renamed first, so that none is ever seen in part
        doomed = (folder / str(old)).rename(folder / f"{old}.tmp")
        shutil.rmtree(doomed)


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state
