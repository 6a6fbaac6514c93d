"""Run folders as a stranger may hand them over: small, and easily broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

META = {
    "status": "finished",
    "arm": "a",
    "seed": 0,
    "layers": [{"kind": "codes", "slots": 4, "top_k": 1}],
}


def write_small_run(path: Path, *, steps: int = 2, **meta: Any) -> Path:
    """A finished run of a few lines, whose arm is the name of its folder."""
    (path / "samples").mkdir(parents=True)
    config = f"task: image_tokenizer\nname: {path.name}\ntrain: {{steps: {steps}}}\n"
    (path / "config.yaml").write_text(config)
    (path / "meta.json").write_text(json.dumps(META | {"arm": path.name} | meta))
    lines = [{"step": i + 1, "train/loss": 1.0, "val/mse": 0.5} for i in range(steps)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "summary.json").write_text(json.dumps({"status": "finished", "val/mse": 0.5}))
    return path
