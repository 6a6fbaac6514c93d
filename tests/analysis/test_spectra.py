"""Singular values of maps: those of the trained W, averaged over maps and runs as they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.testing import assert_close

from simvq_moe.analysis.run_folders import Arm, Group, RunRecord
from simvq_moe.analysis.spectra import MOST_VALUES, spectra_of
from simvq_moe.config.loading import merge_files
from simvq_moe.config.schema import Config
from simvq_moe.engine.world import World
from simvq_moe.tasks.loading import load_run
from tests.launching import ROOT
from tests.short_training import train_two_steps


def test_a_run_leaves_the_singular_values_of_its_trained_map(tmp_path: Path, world: World) -> None:
    config = merge_files(Config, [ROOT / "configs" / "image_quickstart.yaml"])
    train_two_steps(config, tmp_path / "runs", world)
    run_dir = tmp_path / "runs" / config.name
    with np.load(run_dir / "spectra.npz") as arrays:
        values = arrays["00"]
    W = load_run(run_dir)[1]["quantizer.bank.W"].double()
    assert_close(torch.from_numpy(values), torch.linalg.svdvals(W))
    assert not np.allclose(values, 1)  # the identity's


def run(
    folder: Path, seed: int, spectra: dict[str, list[float]], status: str = "finished"
) -> RunRecord:
    path = folder / f"seed{seed}"
    path.mkdir()
    arrays: dict[str, Any] = {k: np.array(v) for k, v in spectra.items()}
    np.savez(path / "spectra.npz", **arrays)
    names = ["blocks.0.moe.router", "blocks.0.moe.experts.down", "blocks.1.moe.experts.down"]
    return RunRecord(path, "mapped", seed, status, meta={"banks": names})


def group(*runs: RunRecord) -> Group:
    return Group("g", "?", "mapped", ("val/loss",), (Arm("mapped", "mapped", False, runs),))


def test_each_map_counts_relative_to_its_largest_value_and_each_run_once(tmp_path: Path) -> None:
    first = run(tmp_path, 0, {"01": [4.0, 2.0], "02": [1.0, 0.1]})
    second = run(tmp_path, 1, {"01": [1.0, 0.9], "02": [2.0, 1.0]})
    failed = run(tmp_path, 2, {"01": [1.0, 1.0]}, status="failed")
    (found,) = spectra_of(group(first, second, failed))
    assert (found.kind, found.ranks) == ("experts.down", [1, 2])
    np.testing.assert_allclose(found.values, [1, (0.3 + 0.7) / 2])
    np.testing.assert_allclose(found.lowest, [1, 0.3])
    np.testing.assert_allclose(found.highest, [1, 0.7])


def test_of_many_values_the_first_and_last_are_kept(tmp_path: Path) -> None:
    many = np.linspace(1, 0.001, 3 * MOST_VALUES)
    (found,) = spectra_of(group(run(tmp_path, 0, {"00": many.tolist()})))
    assert len(found.values) == MOST_VALUES
    assert (found.ranks[0], found.ranks[-1]) == (1, len(many))
    assert (found.values[0], found.values[-1]) == (1, many[-1])


def test_runs_without_maps_and_torn_files_have_no_spectrum(tmp_path: Path) -> None:
    torn = run(tmp_path, 0, {"00": [1.0]})
    (torn.path / "spectra.npz").write_bytes(b"PK")
    assert spectra_of(group(torn)) == []
