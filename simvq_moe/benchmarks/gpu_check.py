"""The last part of launch/gpu_check.sh: memory beside the dry run, and one table of all parts.

python -m simvq_moe.benchmarks.gpu_check OUT
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from simvq_moe.files.of_runs import METRICS
from simvq_moe.text_table import markdown

PARTS = ("quantizer", "moe", "train")
MEMORY = {
    "dense": ("--moe.experts", "1", "--moe.top_k", "1"),
    "mixture": (),
    "mixture, bf16": ("--train.dtype", "bf16"),
    "mixture, checkpointing": ("--train.activation_checkpointing", "true"),
}
"""Variants of the language quickstart whose peaks are measured."""
STEPS = ("--train.steps", "3", "--train.log_every", "1", "--train.probe_tokens", "0")
MIB = 2**20


def main(out: Path) -> None:
    """Write OUT/check.json and OUT/check.md."""
    found = {
        "machine": machine(),
        "tests": tests(out / "tests.xml"),
        "memory": memory(),
        **{part: json.loads((out / f"{part}.json").read_text()) for part in PARTS},
    }
    (out / "check.json").write_text(json.dumps(found, indent=1) + "\n")
    tables = {part: (out / f"{part}.md").read_text() for part in PARTS}
    (out / "check.md").write_text(page(found, tables))


def machine() -> dict[str, str]:
    """What was measured, and with which versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "device": gpu or f"no GPU, a rehearsal on {platform.processor() or platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "date": time.strftime("%Y-%m-%d"),
    }


def tests(report: Path) -> dict[str, Any]:
    """Numbers of tests by their end, and the names of those that failed."""
    suite = ElementTree.parse(report).getroot()
    cases = list(suite.iter("testcase"))
    ends = {kind: [c for c in cases if c.find(kind) is not None] for kind in ("failure", "error")}
    fell = [f"{c.get('classname')}.{c.get('name')}" for kind in ends for c in ends[kind]]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return {"passed": len(cases) - len(fell) - skipped, "skipped": skipped, "failed": fell}


def memory() -> list[dict[str, Any]]:
    """Most memory of a run beside what its dry run says; measured on a GPU alone, because a process
    on CPUs has much else."""
    return [_memory_of(name, flags) for name, flags in MEMORY.items()]


def _memory_of(name: str, flags: tuple[str, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        train = [sys.executable, "-m", "simvq_moe", "train", "--config", "language_quickstart"]
        train += [*STEPS, *flags]
        dry = subprocess.run(
            [*train, "--dry-run"], cwd=folder, capture_output=True, check=True, text=True
        )
        predicted = json.loads(dry.stdout)["per_rank"]["memory_bytes"] / MIB
        if os.environ.get("DEVICE") == "cpu":
            return {"variant": name, "predicted_mib": predicted, "peak_mib": None}
        run = [*train, "--name", "memory"]
        subprocess.run(run, cwd=folder, capture_output=True, check=True)
        log = Path(folder, "runs", "memory", METRICS).read_text().splitlines()
        peaks = [json.loads(line).get("memory/peak_mib", 0.0) for line in log]
        return {"variant": name, "predicted_mib": predicted, "peak_mib": max(peaks)}


def page(found: dict[str, Any], tables: dict[str, str]) -> str:
    """All parts as Markdown."""
    done, rows = found["tests"], [["variant", "dry run, MiB", "measured, MiB", "ratio"]]
    for one in found["memory"]:
        predicted, peak = one["predicted_mib"], one["peak_mib"]
        measured = ("", "") if peak is None else (f"{peak:.1f}", f"{peak / predicted:.2f}")
        rows.append([one["variant"], f"{predicted:.1f}", *measured])
    lines = [f"# {found['machine']['device']}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in found["machine"].items() if value), ""]
    lines += [f"Tests: {done['passed']} passed, {done['skipped']} skipped, "]
    lines[-1] += f"{len(done['failed'])} failed."
    lines += [f"- failed: {name}" for name in done["failed"]]
    for part, table in tables.items():
        lines += ["", f"## bench {part}", "", table.strip()]
    return "\n".join([*lines, "", "## Memory of a step", "", markdown(rows, right=(1, 2, 3)), ""])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
