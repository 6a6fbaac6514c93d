"""Singular values of the shared maps at a run's last evaluation, from its spectra.npz."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simvq_moe.analysis.arms import Arm, Group, bank_kind

MOST_VALUES = 256
"""Of more, some are kept, evenly spread."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of the maps of one kind of an arm, each map's over its largest one."""

    arm: str
    kind: str
    """End of the banks' names: experts.down of blocks.0.moe.experts.down."""
    ranks: list[int]
    """From 1, the largest singular value."""
    values: list[float]
    """Mean over the maps and the finished runs."""
    lowest: list[float]
    highest: list[float]
    """Over the runs, each the mean over its maps."""


def spectra_of(group: Group) -> list[Spectrum]:
    """Of every arm whose finished runs have shared maps."""
    return [spectrum for arm in group.arms for spectrum in _of_arm(arm)]


def _of_arm(arm: Arm) -> list[Spectrum]:
    runs: dict[str, list[np.ndarray]] = {}
    for run in arm.runs:
        names = run.meta.get("banks") or []
        maps: dict[str, list[np.ndarray]] = {}
        for bank, values in _read(run.path / "spectra.npz").items():
            if run.status == "finished" and len(values) and values[0] > 0:
                maps.setdefault(bank_kind(names, int(bank)), []).append(values / values[0])
        for kind, of_kind in maps.items():
            if len({len(values) for values in of_kind}) == 1:
                runs.setdefault(kind, []).append(np.mean(of_kind, axis=0))
    return [
        _spectrum(arm.name, kind, found)
        for kind, found in sorted(runs.items())
        if len({len(values) for values in found}) == 1
    ]


def _spectrum(arm: str, kind: str, runs: list[np.ndarray]) -> Spectrum:
    many = len(runs[0])
    shown = np.linspace(0, many - 1, min(many, MOST_VALUES)).round().astype(int)
    each = np.array(runs)[:, shown]
    mean, lowest, highest = each.mean(0), each.min(0), each.max(0)
    return Spectrum(
        arm, kind, (shown + 1).tolist(), mean.tolist(), lowest.tolist(), highest.tolist()
    )


def _read(file: Path) -> dict[str, np.ndarray]:
    """Empty where there is none that can be read."""
    try:
        # opened here, for numpy leaves a torn file open
        with file.open("rb") as stream, np.load(stream) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return {}
