"""Where a run comes from: its command, commit, versions and machine, for meta.json."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from simvq_moe.config.schema import Config
from simvq_moe.engine.world import World

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
        "commit": commit(),
        "versions": {"python": platform.python_version(), **versions},
        "device": torch.cuda.get_device_name(world.device) if cuda else processor(),
        "world_size": world.size,
        "threads": torch.get_num_threads(),
        "plugins": list(config.plugins),
    }


def commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """The commit of our own checkout, if that is what this package runs from; None: it is not, for
    instance installed into an environment inside of another project's checkout.

    Args:
        package: folder of the package.
    """
    root = package.parent
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or Path(top) != root.resolve():
        return None
    # another project may have copied the package into its root
    own = (f"{package.name}/__init__.py", "pyproject.toml")
    tracked = _git(root, "ls-files", "--error-unmatch", "--", *own)
    project = root / "pyproject.toml"
    if tracked is None or 'name = "simvq-moe"' not in project.read_text(errors="replace"):
        return None
    return _git(root, "describe", "--always", "--dirty", "--abbrev=12")


def last_change(file: Path) -> tuple[str, str] | None:
    """Commit and date (ISO 8601) of the last change of a file; None: it is in no repository of git,
    or it is not committed as it is."""
    if _git(file.parent, "status", "--porcelain", "--", file.name):
        return None
    found = _git(file.parent, "log", "-1", "--format=%h %cI", "--abbrev=12", "--", file.name)
    if found is None:
        return None
    commit, date = found.split()
    return commit, date


def _git(folder: Path, *args: str) -> str | None:
    """What git says; None: it is not installed, or says no."""
    # inside of a hook, or of a rebase, variables would name another repository
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        found = subprocess.run(
            ["git", *args],
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError:
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
