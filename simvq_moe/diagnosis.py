"""`simvq-moe doctor`: what this machine has, what is off, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from simvq_moe.config.loading import with_overrides
from simvq_moe.config.schema import Config
from simvq_moe.config.tasks import task_of, tasks
from simvq_moe.engine.settings import import_deepspeed
from simvq_moe.errors import ConfigError
from simvq_moe.sweeps.machine import launcher

REQUIRED = (
    *("torch", "deepspeed", "tokenizers", "datasets", "tensorboard", "numpy", "scipy"),
    *("tyro", "matplotlib", "jinja2", "jaxtyping", "safetensors", "huggingface_hub"),
    *("torchmetrics", "pillow", "scikit-image", "scikit-learn"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    name: str
    value: str
    remedy: str | None = None
    """What to do; None: nothing is wrong."""


def doctor() -> int:
    """Print the findings on standard error; 1 if something has to be done, else 0."""
    findings = [finding for check in CHECKS for finding in check()]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "ok " if finding.remedy is None else "BAD"
        print(f"{mark} {finding.name:{width}}  {finding.value}", file=sys.stderr)
        if finding.remedy:
            print(f"    {'':{width}}  -> {finding.remedy}", file=sys.stderr)
    wrong = sum(finding.remedy is not None for finding in findings)
    print(f"{wrong} problems found" if wrong else "everything needed is here", file=sys.stderr)
    return 1 if wrong else 0


def _versions() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} at {sys.executable}")
    for name in REQUIRED:
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", f"pip install {name}")


def _devices() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    yield Finding("cpu", f"{cores} cores, {memory.available / 2**30:.1f} GiB of memory free")
    if not torch.cuda.is_available():
        yield Finding("gpu", "none: runs use the CPU and gloo")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield Finding(f"gpu {i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    backends = [name for name in ("gloo", "nccl", "mpi") if dist.is_backend_available(name)]
    needed = "nccl" if torch.cuda.is_available() else "gloo"
    remedy = None if needed in backends else f"install a torch build that has {needed}"
    yield Finding("torch.distributed", ", ".join(backends), remedy)


def _deepspeed() -> Iterator[Finding]:
    module = import_deepspeed()
    version = tuple(int(part) for part in module.__version__.split(".")[:2])
    remedy = None if version == (0, 19) else "pip install 'deepspeed>=0.19,<0.20'"
    accelerator = module.accelerator.get_accelerator().device_name()
    yield Finding("deepspeed accelerator", accelerator, remedy)
    try:
        yield Finding("deepspeed launcher", launcher())
    except ConfigError as error:
        yield Finding("deepspeed launcher", "missing", str(error))


def _data() -> Iterator[Finding]:
    for name, source in {task.name: task.embedded for task in tasks()}.items():
        try:
            config = with_overrides(Config(), {"task": name}, "doctor")
            task_of(config).check_files(config)
            yield Finding(f"data {source!r}", f"readable, for {name}")
        except ConfigError as error:
            yield Finding(f"data {source!r}", "not readable", str(error))


def _offline() -> Iterator[Finding]:
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    state = "offline (HF_HUB_OFFLINE is set)" if offline else "online unless the network says no"
    yield Finding("hugging face hub", f"{state}; embedded data sets never need it")


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    remedy = None if free > 1 else "free some disk space, or set runs_dir to another disk"
    yield Finding("disk", f"{free:.1f} GiB free here", remedy)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _versions,
    _devices,
    _deepspeed,
    _data,
    _offline,
    _disk,
)
