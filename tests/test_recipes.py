"""Every recipe in configs/ loads, says what it is for, and trains two steps."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simvq_moe.config.checks import check
from simvq_moe.config.loading import merge_files
from simvq_moe.config.schema import Config
from simvq_moe.engine.world import World
from simvq_moe.inference.encode import encode_run
from simvq_moe.sweeps.plan import SweepPlan, plan
from tests.launching import ROOT
from tests.short_training import in_two_steps, train_two_steps

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
TOKENIZER_OF = {"image_codes_language": "image_codes_tokenizer"}
"""Recipes of language models that train on codes, and that of their tokenizer."""


def files_of(sweep: Path) -> list[Path]:
    """The files that its command names: a twin for GPUs lies on top of another sweep."""
    command = next(line for line in sweep.read_text().splitlines() if line.startswith("# Command:"))
    return [ROOT / name for name in re.findall(r"--config (\S+)", command)]


PLANS = [(file, plan(files_of(file))) for file in SWEEPS]


def distinct_arms() -> list[Any]:
    """Of arms that train the same two steps, as one quantizer with ever more codes, the first."""
    found: dict[Config, Any] = {}
    for file, sweep in PLANS:
        for run in sweep.runs:
            # the arms of a twin for GPUs are those of the sweep below it
            twin = len(sweep.files) > 1 and run.arm != sweep.spec.groups[run.group].baseline
            if run.seed == sweep.spec.seeds[0] and not twin:
                trained = replace(in_two_steps(run.config), name="", arm="", seed=0, runs_dir="")
                case = pytest.param(run.config, id=f"{file.stem}-{run.group}-{run.arm}")
                found.setdefault(trained, case)
    return list(found.values())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What recipes derive from the same data, once."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("file", [*CONFIGS, *SWEEPS], ids=lambda file: file.stem)
def test_the_header_of_a_recipe_says_question_command_hardware_minutes_and_numbers(
    file: Path,
) -> None:
    header = file.read_text()
    for word in ("# Question:", "# Command:", "# Hardware:", "Minutes:", "# Expect:"):
        assert word in header
    assert str(file.relative_to(ROOT)) in header


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_trains_two_steps(file: Path, tmp_path: Path, world: World, cache: Path) -> None:
    config = merge_files(Config, [file])
    if file.stem in TOKENIZER_OF:
        tokenizer = merge_files(Config, [file.with_name(f"{TOKENIZER_OF[file.stem]}.yaml")])
        train_two_steps(tokenizer, tmp_path / "tokenizer", world)
        codes = tmp_path / "codes"
        encode_run(tmp_path / "tokenizer" / tokenizer.name, None, codes, shard_samples=64)
        config = replace(config, data=replace(config.data, source=str(codes)))
    assert train_two_steps(config, tmp_path / "runs", world, cache)["step"] == 2


@pytest.mark.parametrize(("file", "sweep"), PLANS, ids=lambda case: getattr(case, "stem", ""))
def test_every_arm_of_a_sweep_is_a_run_that_would_start(file: Path, sweep: SweepPlan) -> None:
    assert file in sweep.files
    for run in sweep.runs:
        check(run.config)


@pytest.mark.parametrize("config", distinct_arms())
def test_an_arm_of_a_sweep_trains_two_steps(
    config: Config, tmp_path: Path, world: World, cache: Path
) -> None:
    assert train_two_steps(config, tmp_path / "runs", world, cache)["step"] == 2
