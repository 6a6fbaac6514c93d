"""Checkpoints that exist whole or not at all, and fit any number of ranks.

A checkpoint is a folder: chunks of the state dict's tensors and of Adam's moments, as ranks held
them (`runs.chunks`, `runs.resharding`), and what the training loop keeps, `trainer.pt` and
`rank_<r>.pt`. Every rank writes into a temporary folder; once all have, rank 0 adds a manifest,
renames the folder and moves `latest`, a note for people. A folder without a manifest, or with a
file of another size, is passed over, and so is one in which a rank reads what was not written. If
one rank can't write, all learn of it, and what is half written is removed.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from simvq_moe.config.loading import ConfigError
from simvq_moe.config.schema import TrainConfig
from simvq_moe.engine.agreement import WriteFailed, together, writing
from simvq_moe.engine.world import World
from simvq_moe.files.regular import (
    BrokenFileError,
    parse_json,
    read_bytes,
    sync_folder,
    validate_json,
    write_atomically,
)
from simvq_moe.runs.chunks import INDEX, Index, read_whole

logger = logging.getLogger(__name__)

MANIFEST, CONFIG, SHARED = "manifest.json", "run.yaml", "trainer.pt"
FORMAT = "chunks 1"
"""Form of a checkpoint's files; another one is not read."""

T = TypeVar("T")


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


def save(
    engine: Any,
    folder: Path,
    step: int,
    world: World,
    config: TrainConfig,
    *,
    state: LoopState,
    config_yaml: str = "",
) -> None:
    """Commit the run at this step as folder/<step>, then delete what is not to be kept.

    Args:
        config: says which checkpoints are kept.
        state: of the training loop.
        config_yaml: the run's config, which says whose state this is.

    Raises:
        WriteFailed: on all ranks, if one can't write, say for a full disk; what was saved before is
            as it was.
    """
    # these import deepspeed, which only training needs
    from simvq_moe.engine.pieces import held_pieces, own_share
    from simvq_moe.engine.state import counters
    from simvq_moe.runs.resharding import write_pieces

    temporary = folder / f"{step}.tmp"
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
    try:
        together(world, lambda: _make_room(temporary) if world.is_main else None)
        sizes: dict[str, Any] = {
            name: {"size": size}
            for name, size in write_pieces(temporary, share, world.rank).items()
        }
        seals = together(world, lambda: sizes | _write_others(temporary, others, world))
        manifest["files"] = {name: seal for of_rank in seals for name, seal in of_rank.items()}
        together(world, lambda: _finish(temporary, manifest, config) if world.is_main else None)
    except WriteFailed:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


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


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The model's state dict from a whole checkpoint, on the CPU.

    Raises:
        BrokenFileError: it is not as it was written.
    """
    return dict(read_whole(checkpoint, read_index(checkpoint).weights()))


def read_index(checkpoint: Path) -> Index:
    """Which tensors a whole checkpoint has, and where their chunks lie.

    Raises:
        BrokenFileError: the index is not as it was written.
    """
    return _read_index(checkpoint, _read_manifest(checkpoint))


def newest_weights(folder: Path) -> dict[str, Tensor] | None:
    """The state dict from the newest checkpoint that is as it was written; None: there is none.

    Raises:
        ConfigError: see `check_form`.
    """
    for step in _whole_steps(folder):
        try:
            return load_weights(folder / str(step))
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
            form = _read_manifest(folder / str(step)).get("format")
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
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and p.is_dir())


def _restore(engine: Any, checkpoint: Path, world: World, seed: int) -> Restored:
    # these import deepspeed, which only training needs
    from simvq_moe.engine.pieces import held_pieces, took_up
    from simvq_moe.engine.state import load_counters
    from simvq_moe.runs.resharding import read_pieces

    manifest, index, contents = _read_small(checkpoint, world)
    read_pieces(checkpoint, index, held_pieces(engine))
    took_up(engine)
    load_counters(engine, manifest["counters"])
    same_ranks = manifest["world_size"] == world.size
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
        step = manifest["step"]
        torch.manual_seed(_derived_seed(seed, step, world.rank))
        if world.is_main:
            logger.warning(
                "checkpoint %s was written by %s and goes on with %s: random numbers start again "
                "from seed, step and rank",
                *(checkpoint, _ranks(manifest["world_size"]), _ranks(world.size)),
            )
    return Restored(manifest["step"], shared, own, same_ranks)


def _read_small(checkpoint: Path, world: World) -> tuple[dict[str, Any], Index, dict[str, bytes]]:
    """Manifest, index and what the loop has kept: of as many ranks each its own, of others an even
    part of it.

    Raises:
        BrokenFileError: on every rank, if it is not as it was written where one has looked.
    """
    found = error = None
    try:
        manifest = _read_manifest(checkpoint)
        ranks = range(world.rank, manifest["world_size"], world.size)
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


def _make_room(temporary: Path) -> None:
    with writing(temporary):
        for left_over in temporary.parent.glob("*.tmp"):
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


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MANIFEST
    try:
        manifest = parse_json(read_bytes(path), path)
    except BrokenFileError:
        manifest = None
    if not isinstance(manifest, dict) or "files" not in manifest:
        raise BrokenFileError(path, "is missing or not readable")
    return manifest


def _read_index(checkpoint: Path, manifest: dict[str, Any]) -> Index:
    return validate_json(_read_sealed(checkpoint, INDEX, manifest), Index, checkpoint / INDEX)


def _read_sealed(checkpoint: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """The content of a file that is as it was written."""
    seal = manifest["files"].get(name)
    content = read_bytes(checkpoint / name)
    if seal is None or hashlib.sha256(content).hexdigest() != seal["sha256"]:
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
    for name, seal in _read_manifest(checkpoint)["files"].items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != seal["size"]:
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


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
