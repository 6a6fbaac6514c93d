"""The model card of a run, for `save_pretrained` and `push_to_hub`: what it measured, which codes
or experts it used, the command that made it, and whether its maps are folded."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from simvq_moe.core.bank import Bank
from simvq_moe.errors import ConfigError
from simvq_moe.files.arrays import ARRAY_LIMIT
from simvq_moe.files.regular import BrokenFileError
from simvq_moe.hub import CARD, Pretrained, card_text
from simvq_moe.records.catalogue import metric, results
from simvq_moe.records.tensorboard import heat_map, loads
from simvq_moe.runs.counts import read_windows
from simvq_moe.runs.files import read_meta, read_summary
from simvq_moe.tasks.loading import load_model

PICTURE = "usage.png"


def card_of_run(run_dir: str | Path) -> dict[str, str | bytes]:
    """README.md, and where the run has counted usage usage.png, by name.

    Raises:
        ConfigError: it is no run, or its model has no `save_pretrained`.
    """
    run_dir = Path(run_dir)
    _, model = load_model(run_dir)
    if not isinstance(model, Pretrained):
        raise ConfigError(f"{run_dir}: {type(model).__name__} has no save_pretrained: give another")
    files: dict[str, str | bytes] = {}
    meta = read_meta(run_dir)
    picture = _picture(run_dir, meta)
    if picture is not None:
        files[PICTURE] = picture
    sections = [*_maps(model), *_measures(run_dir), *_usage(files), *_origin(meta)]
    return files | {CARD: card_text(model, about="\n".join(["", *sections, ""]))}


def _maps(model: nn.Module) -> Iterator[str]:
    mapped = any(isinstance(module, Bank) and module.maps for module in model.modules())
    yield (
        "It has shared maps, which are not folded."
        if mapped
        else "It has no shared maps, or they are folded into its weights."
    )


def _measures(run_dir: Path) -> Iterator[str]:
    summary = read_summary(run_dir)
    rows = [
        f"| {name} | {summary[name]:.4g} | {metric(name).meaning} |"
        for name in results()
        if name in summary
    ]
    if rows:
        yield from ("", "## Measures", "", "| held-out measure | value | |", "| --- | --- | --- |")
        yield from rows


def _usage(files: dict[str, str | bytes]) -> Iterator[str]:
    if PICTURE in files:
        yield from (
            *("", "## Usage", ""),
            f"![]({PICTURE})",
            "",
            "Loads at the last logged step: a cell is a code or an expert, bright from four times "
            "its fair share on; layers follow each other in rows.",
        )


def _origin(meta: dict[str, Any]) -> Iterator[str]:
    command, commit = meta.get("command"), meta.get("commit")
    if command:
        shown = command if isinstance(command, str) else " ".join(command)
        yield from ("", "## Made by", "", "```bash", shown, "```")
    if commit:
        yield from ("", f"Commit {commit}.")


def _picture(run_dir: Path, meta: dict[str, Any]) -> bytes | None:
    """The loads of the last logged step as a PNG; None: there are none that can be read."""
    from PIL import Image

    layers = meta.get("layers") or []
    try:
        windows = read_windows(run_dir, layers, held_out=False, limit=ARRAY_LIMIT)
    except BrokenFileError:
        return None
    if windows is None or not layers:
        return None
    last = zip(layers, windows.counts[-1], strict=True)
    rows = [row[: layer["slots"]] for layer, row in last]
    drawn = [_wrapped(loads(row)) for row in rows if row.sum() > 0]
    if not drawn:
        return None
    width = max(row.shape[1] for row in drawn)
    grid = np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]))) for row in drawn])
    out = io.BytesIO()
    Image.fromarray(heat_map(grid)).save(out, "png")
    return out.getvalue()


def _wrapped(load: np.ndarray) -> np.ndarray:
    """One row of up to 128 slots; many codes over several rows."""
    width = min(len(load), 128)
    return np.pad(load, (0, -len(load) % width)).reshape(-1, width)
