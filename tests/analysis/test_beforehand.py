"""What was written down before the runs: stamps of git, and whether they came first."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from simvq_moe.analysis.arms import Arm, Group, RunRecord
from simvq_moe.analysis.beforehand import registrations
from simvq_moe.analysis.predictions import REGISTERED, check_all
from simvq_moe.files.regular import write_json
from simvq_moe.runs.sweep_file import Stamp
from simvq_moe.sweeps.registration import stamps, unknown

EARLY, LATE = "2026-01-01T10:00:00+00:00", "2026-01-01T14:00:00+00:00"
RULES = next(one.file for one in REGISTERED if one.name == "P8")


def group(*registered: Stamp, started: str | None = "2026-01-01T13:00:00+0100") -> Group:
    run = RunRecord(Path("r"), "a", 0, "finished", meta={"started": started} if started else {})
    later = replace(run, meta={"started": "2026-01-02T00:00:00+0000"} if started else {})
    arms = (Arm("a", "A", False, (later, run)),)
    return Group(
        "g", "Q?", "a", ("val/loss",), arms, predictions=("P8",), registered=registered, sweep="s"
    )


def sheet(date: str | None, commit: str | None = "abc") -> Stamp:
    return Stamp(file="sweeps/s.yaml", commit=commit, date=date)


@pytest.mark.parametrize(
    ("date", "commit", "before"),
    # the first run began at noon in Greenwich
    [(EARLY, "abc", True), (LATE, "abc", False), (None, None, None), ("soon", "abc", None)],
)
def test_a_file_is_held_against_the_first_run_of_its_sweep(
    date: str | None, commit: str | None, before: bool | None
):
    (found,) = registrations([group(sheet(date, commit))])
    assert found.before is before
    assert (found.commit, found.date, found.first_run) == (commit, date, "2026-01-01T13:00:00+0100")


@pytest.mark.parametrize(
    ("sheet_date", "rule_date", "before"),
    [(EARLY, EARLY, True), (EARLY, LATE, False), (LATE, EARLY, False), (EARLY, None, None)],
)
def test_a_prediction_came_before_if_its_rule_and_its_sweep_did(
    sheet_date: str, rule_date: str | None, before: bool | None
):
    name = f"{RULES.parent.name}/{RULES.name}"
    rule = Stamp(file=name, commit=rule_date and "def", date=rule_date)
    (found,) = check_all([group(sheet(sheet_date), rule)])
    assert found.name == "P8"
    assert found.before is before


def test_without_stamps_or_runs_it_is_not_known():
    (found,) = check_all([group()])
    assert found.before is None
    (found,) = registrations([group(sheet(EARLY), started=None)])
    assert found.before is None


def test_a_sweep_that_names_no_prediction_has_none_checked():
    assert check_all([replace(group(), predictions=())]) == []


def test_a_number_that_is_not_registered_is_named_with_those_that_are():
    assert unknown(["P8", "P6"]) is None
    assert "'P99'" in (unknown(["P8", "P99"]) or "")
    assert "P1, P2" in (unknown(["P99"]) or "")


def test_stamps_are_the_last_change_that_is_committed_and_earlier_ones_stay(tmp_path: Path):
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", *identity, *words]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    file, folder = tmp_path / "s.yaml", tmp_path / "runs"
    folder.mkdir()
    file.write_text("name: s\n")
    name = f"{tmp_path.name}/s.yaml"
    assert stamps([file], [], folder) == [Stamp(file=name)]
    git("init", "-q")
    git("add", "s.yaml")
    git("commit", "-qm", "first")
    first = stamps([file], [], folder)
    assert first[0].commit == git("rev-parse", "--short=12", "HEAD").strip()
    assert first[0].date == git("log", "-1", "--format=%cI").strip()
    arm = {"name": "a", "runs": []}
    content = {"groups": [{"name": "g", "baseline": "a", "outcomes": [], "arms": [arm]}]}
    saved = {"registered": [stamp.model_dump() for stamp in first]}
    write_json(folder / "sweep.json", content | saved)
    assert stamps([file], [], folder) == first
    file.write_text("name: other\n")
    assert stamps([file], [], folder) == [*first, Stamp(file=name)]
