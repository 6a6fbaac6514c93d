"""Checkpoints that exist whole or not at all.

DeepSpeed writes its files one by one and moves `latest` before other ranks are done. Here every
rank writes into a temporary folder; once all have, rank 0 adds a manifest, renames the folder and
moves `latest`. A folder without a manifest, or with a file of another size, is passed over.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from simvq_moe.config import ConfigError
from simvq_moe.training.engine import World

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def save(
    engine: Any, folder: Path, step: int, rank_state: dict[str, Any], world: World, keep: int
) -> None:
    """Commit engine and every rank's own state as folder/<step>; delete all but `keep` latest.

    Args:
        rank_state: what this rank needs beside the engine to go on exactly.
    """
    tag = f"{step}.tmp"
    if world.is_main:
        shutil.rmtree(folder / tag, ignore_errors=True)
    world.barrier()
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    state = rank_state | {"rng": _rng_state(world.device)}
    torch.save(state, folder / tag / f"rank_{world.rank}.pt")
    world.barrier()
    if world.is_main:
        _commit(folder, tag, step, world)
        for old in committed_steps(folder)[:-keep]:
            shutil.rmtree(folder / str(old))
    world.barrier()


def restore(engine: Any, folder: Path, world: World) -> tuple[int, dict[str, Any]] | None:
    """Load the latest whole checkpoint; its step and this rank's state. None: there is none.

    Raises:
        ConfigError: it was written by another number of ranks.
    """
    step = latest_step(folder) if world.is_main else None
    if world.size > 1:
        found = [step]
        dist.broadcast_object_list(found, src=0)
        step = found[0]
    if step is None:
        return None
    check_world(folder, step, world.size)
    engine.load_checkpoint(str(folder), tag=str(step))
    # rank states are ours and hold optimizer-free bookkeeping: tensors, numbers, strings
    state = torch.load(folder / str(step) / f"rank_{world.rank}.pt", weights_only=True)
    _set_rng_state(state.pop("rng"), world.device)
    return step, state


def latest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint whose files are all there; broken ones are named in the log."""
    for step in reversed(committed_steps(folder)):
        broken = _broken_file(folder / str(step))
        if broken is None:
            return step
        logger.warning("checkpoint %s is skipped: %s", folder / str(step), broken)
    return None


def check_world(folder: Path, step: int, world_size: int) -> None:
    """Raise `ConfigError` if the checkpoint belongs to another number of ranks."""
    written_by = json.loads((folder / str(step) / MANIFEST).read_text())["world_size"]
    if written_by != world_size:
        raise ConfigError(
            f"checkpoint {folder / str(step)} was written by {_ranks(written_by)} and this "
            f"launch has {world_size}: launch {_ranks(written_by)}, or give the run another --name"
        )


def _ranks(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"


def committed_steps(folder: Path) -> list[int]:
    """Steps of the committed checkpoints, ascending."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and p.is_dir())


def _commit(folder: Path, tag: str, step: int, world: World) -> None:
    files = {p.name: p.stat().st_size for p in (folder / tag).iterdir()}
    manifest = {"step": step, "world_size": world.size, "files": files}
    (folder / tag / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*(folder / tag).iterdir(), folder / tag]:
        _flush_to_disk(path)
    final = folder / str(step)
    shutil.rmtree(final, ignore_errors=True)
    (folder / tag).rename(final)
    pointer = folder / "latest.tmp"
    pointer.write_text(str(step))
    pointer.replace(folder / "latest")
    _flush_to_disk(folder)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _broken_file(checkpoint: Path) -> str | None:
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"it has no {MANIFEST}"
    try:
        files = json.loads(manifest.read_text())["files"]
    except (json.JSONDecodeError, KeyError):
        return f"its {MANIFEST} is not readable"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or has another size than when it was written"
    return None


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
