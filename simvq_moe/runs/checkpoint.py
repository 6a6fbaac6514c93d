"""Checkpoints that exist whole or not at all, and fit any number of ranks.

A checkpoint is a folder of whole tensors by name, in safetensors: `model_<r>` the state dict,
`optimizer_<r>` Adam's moments, with tensors dealt out to ranks in turn, so that nobody holds all;
`trainer.pt` and `rank_<r>.pt` are what the training loop keeps. Every rank writes into a temporary
folder; once all have, rank 0 adds a manifest, renames the folder and moves `latest`, a note for
people. A folder without a manifest, or with a file of other content, is passed over. If one rank
can't write, all learn of it, and what is half written is removed.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from simvq_moe.config.loading import ConfigError
from simvq_moe.config.schema import TrainConfig
from simvq_moe.data.hashing import file_sha256
from simvq_moe.engine.agreement import WriteFailed, together, writing
from simvq_moe.engine.world import World
from simvq_moe.files.regular import sync_folder, write_atomically, written_whole

logger = logging.getLogger(__name__)

MANIFEST, CONFIG = "manifest.json", "run.yaml"
FORMAT = "whole tensors 1"
"""Form of a checkpoint's files; another one is not read."""


Buffer = bytes | memoryview


@dataclass(frozen=True)
class LoopState:
    """What a part of the training loop keeps: tensors, numbers, strings, and containers of them."""

    shared: dict[str, Any]
    """The same on all ranks; rank 0's is written."""
    own: dict[str, Any]
    """Of this rank."""

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
    """What each rank had beside that, of as many ranks as there were."""


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
    from simvq_moe.engine import (
        state as engine_state,  # imports deepspeed, which only training needs
    )

    temporary = folder / f"{step}.tmp"
    tensors = _own_part(engine_state.whole_tensors(engine), world)
    others: dict[str, Buffer] = {
        f"rank_{world.rank}.pt": _serialized(state.own | {"rng": _rng_state(world.device)})
    }
    if world.is_main:
        others |= {"trainer.pt": _serialized(state.shared), CONFIG: config_yaml.encode()}
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": world.size,
        "zero_stage": engine.zero_optimization_stage(),
        "counters": engine_state.counters(engine),
    }
    try:
        together(world, lambda: _make_room(temporary) if world.is_main else None)
        seals = together(world, lambda: _write_part(temporary, tensors, others))
        manifest["files"] = {name: seal for of_rank in seals for name, seal in of_rank.items()}
        together(world, lambda: _finish(temporary, manifest, config) if world.is_main else None)
    except WriteFailed:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def restore(engine: Any, folder: Path, world: World, seed: int) -> Restored | None:
    """Load the latest whole checkpoint into the engine; None: there is none.

    The state of random numbers is taken up by as many ranks as wrote it. Other ranks start again
    from seed, step and rank.

    Raises:
        ConfigError: it lacks a tensor of the model, or is of another form.
    """
    from simvq_moe.engine import (
        state as engine_state,  # imports deepspeed, which only training needs
    )

    found = [latest_step(folder) if world.is_main else None]
    if world.size > 1:
        dist.broadcast_object_list(found, src=0)
    step = found[0]
    if step is None:
        return None
    checkpoint = folder / str(step)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    with _reader(checkpoint, manifest) as read:
        engine_state.load_tensors(engine, read)
    engine_state.load_counters(engine, manifest["counters"])
    # of our own writing: tensors, numbers, strings
    shared = torch.load(checkpoint / "trainer.pt", map_location=world.device, weights_only=True)
    own = [
        torch.load(checkpoint / f"rank_{rank}.pt", map_location=world.device, weights_only=True)
        for rank in range(manifest["world_size"])
    ]
    rng = [state.pop("rng") for state in own]
    if len(own) == world.size and world.device.type in rng[world.rank]:
        _set_rng_state(rng[world.rank], world.device)
    else:
        torch.manual_seed(_derived_seed(seed, step, world.rank))
        if world.is_main:
            logger.warning(
                "checkpoint %s was written by %s and goes on with %s: random numbers start again "
                "from seed, step and rank",
                *(checkpoint, _ranks(len(own)), _ranks(world.size)),
            )
    return Restored(step, shared, own)


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The model's state dict from a whole checkpoint, on the CPU."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    weights: dict[str, Tensor] = {}
    for file in _parts(checkpoint, manifest, "model"):
        weights |= load_file(file)
    return weights


def latest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint whose files are as written; broken ones are named in the log.

    Raises:
        ConfigError: see `check_form`.
    """
    check_form(folder)
    for step in reversed(committed_steps(folder)):
        defect = _defect(folder / str(step))
        if defect is None:
            return step
        logger.warning("checkpoint %s is skipped: %s", folder / str(step), defect)
    return None


def check_form(folder: Path) -> None:
    """Raise `ConfigError` if a checkpoint has a form that this version doesn't know."""
    for step in committed_steps(folder):
        manifest = _manifest(folder / str(step))
        if manifest is not None and manifest.get("format") != FORMAT:
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


def _own_part(wholes: Iterator[Any], world: World) -> dict[str, dict[str, Tensor]]:
    """Every world.size-th tensor and its moments, by the file that they go to."""
    model: dict[str, Tensor] = {}
    optimizer: dict[str, Tensor] = {}
    for i, whole in enumerate(wholes):
        if i % world.size == world.rank:
            model[whole.name] = whole.weight.cpu()
            for moment, tensor in whole.moments.items():
                optimizer[_key(whole.name, moment)] = tensor.cpu()
    parts = {"model": model, "optimizer": optimizer}
    return {f"{kind}_{world.rank}.safetensors": part for kind, part in parts.items()}


def _make_room(temporary: Path) -> None:
    with writing(temporary):
        for left_over in temporary.parent.glob("*.tmp"):
            shutil.rmtree(left_over)
        temporary.mkdir(parents=True)
        sync_folder(temporary.parent.parent)


def _serialized(state: dict[str, Any]) -> Buffer:
    # in memory, for of a full disk torch says no more than that writing failed
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def _write_part(
    target: Path, tensors: dict[str, dict[str, Tensor]], others: Mapping[str, Buffer]
) -> dict[str, Any]:
    """Write files of tensors and other files; their names and seals."""
    seals: dict[str, Any] = {}
    for name in (*tensors, *others):
        with writing(target / name):
            with written_whole(target / name) as file:
                if name in tensors:
                    save_file(tensors[name], file)
                else:
                    file.write_bytes(others[name])
            seals[name] = _seal(target / name)
    return seals


@contextmanager
def _reader(
    checkpoint: Path, manifest: dict[str, Any]
) -> Iterator[Callable[[str, str | None], Tensor]]:
    """Reads one tensor at a time by name, or a moment of it."""
    with ExitStack() as stack:
        file_of: dict[str, Any] = {}
        for kind in ("model", "optimizer"):
            for path in _parts(checkpoint, manifest, kind):
                file = stack.enter_context(safe_open(path, "pt"))
                file_of |= dict.fromkeys(file.keys(), file)

        def read(name: str, moment: str | None) -> Tensor:
            key = _key(name, moment)
            if key not in file_of:
                raise ConfigError(
                    f"checkpoint {checkpoint} lacks {key}: use the version that wrote it, or train "
                    "again with another --name"
                )
            return file_of[key].get_tensor(key)

        yield read


def _key(name: str, moment: str | None) -> str:
    return name if moment is None else f"{moment}/{name}"


def _parts(checkpoint: Path, manifest: dict[str, Any], kind: str) -> list[Path]:
    return [checkpoint / name for name in manifest["files"] if name.startswith(f"{kind}_")]


def _seal(path: Path) -> dict[str, Any]:
    """Size and hash of a file that is safe on disk."""
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


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


def _manifest(checkpoint: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "files" in manifest else None


def _defect(checkpoint: Path) -> str | None:
    """What keeps it from being read, if anything."""
    manifest = _manifest(checkpoint)
    if manifest is None:
        return f"its {MANIFEST} is missing or not readable"
    for name, seal in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != seal["size"]:
            return f"{name} is missing or has another size than when it was written"
        if file_sha256(path) != seal["sha256"]:
            return f"{name} has another content than when it was written"
    return None


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
