"""How often slots were drawn (usage.npz), and where the probe's tokens went (probe.npz).

As `simvq_moe.runs.files` does, the readers let nothing through that is not of its form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simvq_moe.core.ids import NOBODY
from simvq_moe.files.arrays import Layout, read_arrays
from simvq_moe.files.of_runs import PROBE, USAGE
from simvq_moe.files.regular import BrokenFileError, MissingFileError

MOST_DRAWS = 2**62
"""Draws of all slots of a layer together, at most, so that their sum is an int64."""


def read_held_out_counts(run: Path, layers: list[dict[str, Any]]) -> np.ndarray | None:
    """The held-out counts of the last evaluation in usage.npz, int64 [layer, slot].

    Args:
        layers: those of meta.json, whose slots must be there; empty: not known.
    """
    file = run / USAGE
    try:
        counts = read_arrays(file, {"val_counts": Layout("iu", 3, optional=True)}, inside=run)
    except MissingFileError:
        return None
    if not len(counts.get("val_counts", ())):
        return None
    last = counts["val_counts"][-1]
    _check_counts(last, file)
    _check_layers(last, layers, file)
    return last.astype(np.int64)


class Windows(NamedTuple):
    """Counts of all logged windows of a run."""

    steps: np.ndarray
    """int64, where each window ends, ascending."""
    counts: np.ndarray
    """Draws, int64 [window, layer, slot], zero behind the last slot of a layer."""


def read_windows(
    run: Path, layers: list[dict[str, Any]], *, held_out: bool, limit: int
) -> Windows | None:
    """The counts of every window in usage.npz, or of every evaluation; None: there are none.

    Args:
        layers: those of meta.json, whose slots must be there; empty: not known.
        held_out: those of evaluations.
        limit: bytes that the counts may have, unpacked.
    """
    file, prefix = run / USAGE, "val_" if held_out else ""
    names = f"{prefix}steps", f"{prefix}counts"
    layouts = {names[0]: Layout("iu", 1, optional=True), names[1]: Layout("iu", 3, optional=True)}
    try:
        found = read_arrays(file, layouts, limit=limit, inside=run)
    except MissingFileError:
        return None
    steps, counts = (found.get(name, np.zeros(0, np.int64)) for name in names)
    if not counts.size:
        return None
    if len(steps) != len(counts):
        raise BrokenFileError(file, f"has {len(steps)} {names[0]} for {len(counts)} {names[1]}")
    _check_range(names[0], steps, 0, 2**53, file)
    if (np.diff(steps.astype(np.int64)) <= 0).any():
        raise BrokenFileError(file, f"has {names[0]} that do not ascend")
    _check_counts(counts, file)
    _check_layers(counts[-1], layers, file)
    return Windows(steps.astype(np.int64), counts.astype(np.int64, copy=False))


def read_probe(run: Path) -> dict[str, np.ndarray] | None:
    """How the probe was routed, from probe.npz, as `simvq_moe.training.probe` keeps it: ids
    [evaluation, layer, token, choice], -1 is nobody, and tokens of each expert and domain; older
    ones lack the steps of evaluations and the tokens' ids; None: there is none."""
    file = run / PROBE
    layouts = {"ids": Layout("iu", 4), "domain_counts": Layout("iu", 4)}
    layouts |= {"domain_names": Layout("U", 1), "domains": Layout("iu", 1)}
    layouts |= dict.fromkeys(("steps", "token_ids"), Layout("iu", 1, optional=True))
    try:
        found = read_arrays(file, layouts, inside=run)
    except MissingFileError:
        return None
    ids, counts = found["ids"], found["domain_counts"]
    shape = f"ids of shape {ids.shape} and domain_counts of shape {counts.shape}"
    fit = counts.shape[:2] == ids.shape[:2] and ids.shape[2] == len(found["domains"])
    if not fit or not ids.size or not counts.size:
        raise BrokenFileError(file, f"has {shape}, of {len(found['domains'])} tokens")
    _check_range("ids", ids, NOBODY, counts.shape[2], file)
    _check_range("domains", found["domains"], 0, counts.shape[3], file)
    if len(found["domain_names"]) != counts.shape[3]:
        raise BrokenFileError(file, f"has {len(found['domain_names'])} domain_names for {shape}")
    for name, of in (("steps", ids.shape[0]), ("token_ids", ids.shape[2])):
        if len(found.get(name, range(of))) != of:
            raise BrokenFileError(file, f"has {len(found[name])} {name} for {shape}")
    _check_counts(counts[-1], file)
    return found


def _check_layers(counts: np.ndarray, layers: list[dict[str, Any]], file: Path) -> None:
    """Counts of one window must be of these layers, if any are known."""
    slots = max((layer["slots"] for layer in layers), default=0)
    if layers and (len(counts) != len(layers) or counts.shape[1] < slots):
        raise BrokenFileError(
            file, f"has counts of shape {counts.shape} for {len(layers)} layers of {slots} slots"
        )


def _check_counts(counts: np.ndarray, file: Path) -> None:
    if counts.size and (counts.min() < 0 or counts.sum(dtype=np.float64) > MOST_DRAWS):
        raise BrokenFileError(file, "has counts below 0, or beyond all bounds")


def _check_range(name: str, values: np.ndarray, least: int, end: int, file: Path) -> None:
    if values.size and (values.min() < least or values.max() >= end):
        raise BrokenFileError(file, f"has {name} that are not from {least} to {end - 1}")
