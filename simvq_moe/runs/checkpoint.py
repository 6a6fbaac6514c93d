"""Checkpoints that exist whole or not at all, and fit any number of ranks: what is read of them.

A checkpoint is a folder: chunks of the state dict's tensors and of Adam's moments, as ranks held
them (`runs.chunks`, `runs.resharding`), and what the training loop keeps, `trainer.pt` and
`rank_<r>.pt`; `runs.saving` writes it. A folder without a manifest, or with a file of another size,
is passed over, and so is one in which a rank reads what was not written.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import (
    BrokenFileError,
    parse_json,
    read_bytes,
    validate,
    validate_json,
)
from simvq_moe.files.tensors import DTYPES, Form, StoredWeights
from simvq_moe.runs.chunks import INDEX, Count, Index, read_whole

logger = logging.getLogger(__name__)

MANIFEST, CONFIG, SHARED = "manifest.json", "run.yaml", "trainer.pt"
FORMAT = "chunks 1"
"""Form of a checkpoint's files; another one is not read."""

T = TypeVar("T")


class Seal(BaseModel):
    """A file as it was when it was written."""

    model_config = ConfigDict(frozen=True)
    size: Count
    """Bytes."""
    sha256: str | None = None
    """None: its chunks have digests of their own."""


class Counters(BaseModel):
    """How far the engine had come, see `engine.state.counters`."""

    model_config = ConfigDict(frozen=True)
    global_steps: Count
    global_samples: Count
    skipped_steps: Count
    optimizer_step: Count
    schedule_step: Count
    loss_scale: dict[str, int | float]


class Manifest(BaseModel):
    """What a checkpoint says of itself; the folder may be anybody's."""

    model_config = ConfigDict(frozen=True)
    step: Count
    world_size: Annotated[int, Field(ge=1)]
    """Ranks that wrote it."""
    counters: Counters
    files: dict[str, Seal]

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        if self.world_size > len(self.files):
            raise ValueError(f"{self.world_size} ranks have {len(self.files)} files")
        return self


@dataclass(frozen=True)
class LoopState:
    """What a part of the training loop keeps: tensors, numbers, strings, and containers of them."""

    shared: dict[str, Any]
    """The same on all ranks; rank 0's is written."""
    own: dict[str, Any]
    """What this rank alone has."""

    def __or__(self, other: LoopState) -> LoopState:
        """The state of two parts, which have no names in common."""
        return LoopState(self.shared | other.shared, self.own | other.own)


@dataclass(frozen=True)
class Restored:
    """Where a run goes on."""

    step: int
    shared: dict[str, Any]
    """What all ranks of the loop had in common."""
    own: list[dict[str, Any]]
    """What a rank had beside that: this one's alone, or of other numbers of ranks everyone's."""
    same_ranks: bool
    """Whether as many ranks wrote it."""


def restore(engine: Any, folder: Path, world: World, seed: int) -> Restored | None:
    """Load the latest whole checkpoint into the engine; None: there is none.

    Each rank reads what it holds. The state of random numbers is taken up by as many ranks as wrote
    it. Other ranks start again from seed, step and rank.

    Raises:
        ConfigError: it lacks a tensor of the model, or is of another form; or no checkpoint is as
            it was written, which shows only when it is read.
    """
    steps = _whole_steps(folder) if world.is_main else None
    broken = None
    while (step := _from_main(next(steps, None) if steps else None, world)) is not None:
        try:
            return _restore(engine, folder / str(step), world, seed)
        except BrokenFileError as error:
            broken = error
            if world.is_main:
                _say_skipped(folder / str(step), error)
    if broken is not None:
        raise ConfigError(
            f"no checkpoint in {folder} is as it was written ({broken}): put one back, or remove "
            "them to train again from the start"
        )
    return None


def load_weights(checkpoint: Path) -> StoredWeights:
    """The model's state dict in a whole checkpoint.

    Raises:
        BrokenFileError: it is not as it was written, here or where a tensor is asked for.
    """
    tensors = read_index(checkpoint).weights()

    def read(name: str) -> Tensor:
        ((_, tensor),) = read_whole(checkpoint, {name: tensors[name]})
        return tensor

    forms = {name: Form(DTYPES[of.dtype], of.shape) for name, of in tensors.items()}
    return StoredWeights(forms, read)


def read_index(checkpoint: Path) -> Index:
    """Which tensors a whole checkpoint has, and where their chunks lie.

    Raises:
        BrokenFileError: the index is not as it was written.
    """
    return _read_index(checkpoint, _read_manifest(checkpoint))


def newest_weights(folder: Path) -> StoredWeights | None:
    """The state dict in the newest checkpoint that is as it was written; None: there is none.

    Raises:
        ConfigError: see `check_form`.
    """
    for step in _whole_steps(folder):
        try:
            weights = load_weights(folder / str(step))
            weights.digest()  # reads all, and so finds what is broken
            return weights
        except BrokenFileError as error:
            _say_skipped(folder / str(step), error)
    return None


def latest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint whose files are all there; no content is read. Broken ones are
    named in the log.

    Raises:
        ConfigError: see `check_form`.
    """
    return next(iter(_whole_steps(folder)), None)


def check_form(folder: Path) -> None:
    """Raise `ConfigError` if a checkpoint has a form that this version doesn't know."""
    for step in committed_steps(folder):
        try:
            form = _read_content(folder / str(step)).get("format")
        except BrokenFileError:
            continue  # passed over, and told, where checkpoints are read
        if form != FORMAT:
            raise ConfigError(
                f"checkpoint {folder / str(step)} has another form than this version reads: use "
                "the version that wrote it, or train again with another --name"
            )


def config_file(folder: Path) -> Path | None:
    """The config in the newest committed checkpoint; None: there is none."""
    files = [folder / str(step) / CONFIG for step in committed_steps(folder)]
    return next((file for file in reversed(files) if file.is_file()), None)


def committed_steps(folder: Path) -> list[int]:
    """Steps of the committed checkpoints, ascending."""
    found = ((step_named(path.name), path) for path in folder.glob("*"))
    return sorted(step for step, path in found if step is not None and path.is_dir())


def step_named(name: str) -> int | None:
    """The step whose checkpoint has this name; None: it is another's, such as "007" or "²"."""
    is_one = name.isascii() and name.isdigit() and str(int(name)) == name
    return int(name) if is_one else None


def _restore(engine: Any, checkpoint: Path, world: World, seed: int) -> Restored:
    # these import deepspeed, which only training needs
    from simvq_moe.engine.pieces import held_pieces, took_up
    from simvq_moe.engine.state import load_counters
    from simvq_moe.runs.resharding import read_pieces

    manifest, index, contents = _read_small(checkpoint, world)
    read_pieces(checkpoint, index, held_pieces(engine))
    took_up(engine)
    load_counters(engine, manifest.counters.model_dump())
    same_ranks = manifest.world_size == world.size
    if not same_ranks:
        contents = {
            name: one for of_rank in world.gather(contents) for name, one in of_rank.items()
        }
    # of our own writing: tensors, numbers, strings
    states = {
        name: torch.load(io.BytesIO(content), map_location=world.device, weights_only=True)
        for name, content in contents.items()
    }
    shared = states.pop(SHARED)
    own = [states[name] for name in sorted(states, key=_rank_of)]
    rngs = [state.pop("rng") for state in own]
    if same_ranks and world.device.type in rngs[0]:
        _set_rng_state(rngs[0], world.device)
    else:
        step = manifest.step
        torch.manual_seed(_derived_seed(seed, step, world.rank))
        if world.is_main:
            logger.warning(
                "checkpoint %s was written by %s and goes on with %s: random numbers start again "
                "from seed, step and rank",
                checkpoint,
                _ranks(manifest.world_size),
                _ranks(world.size),
            )
    return Restored(manifest.step, shared, own, same_ranks)


def _read_small(checkpoint: Path, world: World) -> tuple[Manifest, Index, dict[str, bytes]]:
    """Manifest, index and what the loop has kept: of as many ranks each its own, of others an even
    part of it.

    Raises:
        BrokenFileError: on every rank, if it is not as it was written where one has looked.
    """
    found = error = None
    try:
        manifest = _read_manifest(checkpoint)
        ranks = range(world.rank, manifest.world_size, world.size)
        names = (SHARED, *(f"rank_{rank}.pt" for rank in ranks))
        contents = {name: _read_sealed(checkpoint, name, manifest) for name in names}
        found = manifest, _read_index(checkpoint, manifest), contents
    except BrokenFileError as broken:
        error = broken
    for broken in world.gather(error):
        if broken is not None:
            raise broken
    assert found is not None
    return found


def _from_main(value: T, world: World) -> T:
    """What rank 0 gives, on every rank."""
    found = [value]
    if world.size > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def _read_manifest(checkpoint: Path) -> Manifest:
    return validate(_read_content(checkpoint), Manifest, checkpoint / MANIFEST)


def _read_content(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint of any form."""
    path = checkpoint / MANIFEST
    try:
        manifest = parse_json(read_bytes(path), path)
    except BrokenFileError:
        manifest = None
    if not isinstance(manifest, dict) or "files" not in manifest:
        raise BrokenFileError(path, "is missing or not readable")
    return manifest


def _read_index(checkpoint: Path, manifest: Manifest) -> Index:
    return validate_json(_read_sealed(checkpoint, INDEX, manifest), Index, checkpoint / INDEX)


def _read_sealed(checkpoint: Path, name: str, manifest: Manifest) -> bytes:
    """The content of a file that is as it was written."""
    seal = manifest.files.get(name)
    content = read_bytes(checkpoint / name)
    if seal is None or hashlib.sha256(content).hexdigest() != seal.sha256:
        raise BrokenFileError(checkpoint / name, "has another content than when it was written")
    return content


def _whole_steps(folder: Path) -> Iterator[int]:
    """Steps of the checkpoints whose files are all there, newest first; others are told."""
    check_form(folder)
    for step in reversed(committed_steps(folder)):
        try:
            _check_sizes(folder / str(step))
            yield step
        except BrokenFileError as error:
            _say_skipped(folder / str(step), error)


def _check_sizes(checkpoint: Path) -> None:
    for name, seal in _read_manifest(checkpoint).files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != seal.size:
            raise BrokenFileError(path, "is missing or has another size than when it was written")


def _say_skipped(checkpoint: Path, error: BrokenFileError) -> None:
    name = Path(error.path).name
    its = f"its {name}" if name == MANIFEST else name
    logger.warning("checkpoint %s is skipped: %s %s", checkpoint, its, error.reason)


def _rank_of(name: str) -> int:
    return int(name.removeprefix("rank_").removesuffix(".pt"))


def _ranks(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"


def _derived_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def _set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
