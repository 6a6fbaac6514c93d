"""Start the program as a user does, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TIMINGS = ("time", "speed/")
"""Prefixes of metrics that no two runs share."""


def environment() -> dict[str, str]:
    """One thread a process; the package from this checkout, from any working directory."""
    ours = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return os.environ | ours


def start(*args: str, cwd: Path, ranks: int = 1) -> subprocess.Popen[str]:
    """`simvq-moe ...` in cwd, by torchrun for more than one rank."""
    launch = ["-m", "simvq_moe", *args]
    if ranks > 1:
        launch = [
            *("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"),
            *launch,
        ]
    return subprocess.Popen(
        [sys.executable, *launch],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(*args: str, cwd: Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """`start`, to the end."""
    process = start(*args, cwd=cwd, ranks=ranks)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without timings."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMINGS)} for line in lines]
