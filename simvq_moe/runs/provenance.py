"""Where a run comes from: its command, commit, versions and machine, for meta.json."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from simvq_moe.config.schema import Config
from simvq_moe.engine.world import World
from simvq_moe.runs.history import commit

PACKAGES = ("simvq-moe", "torch", "deepspeed", "tokenizers", "datasets", "numpy")


def provenance(config: Config, world: World) -> dict[str, Any]:
    """What can be known of a run before it begins."""
    cuda = world.device.type == "cuda"
    arguments = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "task": config.task,
        "arm": config.arm or config.name,
        "seed": config.seed,
        "command": shlex.join(["simvq-moe", *arguments]),
        "commit": commit() if world.is_main else None,  # rank 0's is written down
        "versions": {"python": platform.python_version(), **versions},
        "device": torch.cuda.get_device_name(world.device) if cuda else processor(),
        "world_size": world.size,
        "threads": torch.get_num_threads(),
        "plugins": list(config.plugins),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
