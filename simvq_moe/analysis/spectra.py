"""Singular values of the shared maps at a run's last evaluation, from its spectra.npz."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simvq_moe.analysis.arms import Arm, Group, RunRecord, bank_kind
from simvq_moe.files.regular import BrokenFileError
from simvq_moe.runs.files import read_spectra

MOST_VALUES = 256
"""Values that are kept of a map, at most, evenly spread."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of the maps of one kind of an arm, each map's over its largest one."""

    arm: str
    kind: str
    """End of the banks' names: experts.down of blocks.0.moe.experts.down."""
    ranks: list[int]
    """Ranks of the singular values; 1 is the largest."""
    values: list[float]
    """Mean over the maps and the finished runs."""
    lowest: list[float]
    highest: list[float]
    """Over the runs, each the mean over its maps."""


def spectra_of(group: Group, left_out: list[str] | None = None) -> list[Spectrum]:
    """Spectra of every arm whose finished runs have shared maps.

    Args:
        left_out: gets a line for each file that can't be read.
    """
    lines = [] if left_out is None else left_out
    return [spectrum for arm in group.arms for spectrum in _of_arm(arm, lines)]


def _of_arm(arm: Arm, left_out: list[str]) -> list[Spectrum]:
    runs: dict[str, list[np.ndarray]] = {}
    for run in arm.runs:
        names = run.meta.get("banks") or []
        maps: dict[str, list[np.ndarray]] = {}
        for bank, values in _spectra(run, left_out).items():
            if len(values) and values[0] > 0:
                maps.setdefault(bank_kind(names, bank), []).append(values / values[0])
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


def _spectra(run: RunRecord, left_out: list[str]) -> dict[int, np.ndarray]:
    try:
        return read_spectra(run.path) if run.status == "finished" else {}
    except BrokenFileError as error:
        left_out.append(str(error))
        return {}
