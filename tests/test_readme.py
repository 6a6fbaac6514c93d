"""Every command and program of the README runs, shortened where it would train for minutes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from simvq_moe.cli import main
from simvq_moe.engine.world import World
from tests.launching import ROOT, environment, run_forked

DOCS = ROOT / "docs"
SHORT = (
    *("--train.steps", "2", "--train.log_every", "1", "--data.crops", "64"),
    *("--data.held_out_crops", "18", "--train.eval_batch_size", "256"),
)
LANGUAGE = {"configs/language_quickstart.yaml", "language_quickstart"}
TEXT = ("--data.source", str(ROOT / "tests" / "moe"))
"""A hundredth of the text that the pages train on."""
QUICKSTARTS = ("launch/quickstart.sh", "launch/test.sh", "simvq-moe sweep")
"""Commands that train every arm, or need its runs: `test_the_quickstart_runs_in_a_fresh_clone`."""
INSTALLS = ("python3 -m venv ", "source ", "pip ")
"""Need a network: `test_wheel` builds the wheel and uses it, `launch/test.sh` installs a clone."""
IN_THIS_PROCESS = tuple(
    f"simvq-moe {name} "
    for name in ("report", "eval", "generate", "fold", "encode", "decode", "watch")
)
"""Commands that need no process of their own, and its seconds of imports."""
BENCH = "simvq-moe bench"
"""Minutes: `test_the_benchmark_prints_its_table`."""


PAGES = ("README.md", "docs/start.md", "docs/tokenizers.md", "docs/python.md")
"""Whose commands go on from each other; `test_docs` has the pages that stand alone."""


def blocks(language: str) -> list[str]:
    text = "".join((ROOT / page).read_text() for page in PAGES)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> list[str]:
    return [command for block in blocks("bash") for command in commands_of(block)]


def commands_of(block: str) -> list[str]:
    """One a line, without what stands behind it."""
    lines = (line.split("  #")[0].strip() for line in block.splitlines())
    return [line for line in lines if line]


def shortened(command: str) -> list[str]:
    words = shlex.split(command)
    if "train" in words and "--dry-run" not in words and "--help" not in words:
        words += SHORT
        if LANGUAGE.intersection(words) and "--data.source" not in words:
            words += TEXT
    return words


@pytest.mark.distributed
def test_the_commands_of_the_readme_run_in_order(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    del world
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    left_out = (*QUICKSTARTS, *INSTALLS, BENCH)
    run = [command for command in commands() if not command.startswith(left_out)]
    assert len(run) >= 8
    for command in run:
        if command.startswith("simvq-moe dashboard"):
            starts_and_stops([*shortened(command), "--port", "0"], tmp_path)
            continue
        if command.startswith(IN_THIS_PROCESS) or "--dry-run" in command:
            assert main(shlex.split(command)[1:]) == 0, command
            continue
        program, *words = shortened(command)
        if command.startswith("simvq-moe "):
            done = run_forked(*words, cwd=tmp_path)
        else:  # launchers
            done = subprocess.run(
                [program, *words],
                cwd=tmp_path,
                env=environment(),
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    summary = json.loads((tmp_path / "runs" / "two_ranks" / "summary.json").read_text())
    assert summary["step"] == 2
    assert (tmp_path / "runs" / "report" / "report.html").stat().st_size > 10_000


def starts_and_stops(command: list[str], folder: Path) -> None:
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    assert any(line.startswith("http://127.0.0.1") for line in process.stderr)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)


def test_the_programs_of_the_readme_run(tmp_path: Path) -> None:
    """One after the other in one process, as a reader would who goes on in one notebook."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks("python"))],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in DOCS.glob("*.md"))])
def test_the_paths_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:simvq_moe|configs|launch|tests)/[\w./]*)`", text)
    assert all((ROOT / path).exists() for path in named), named
    linked = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    for path in linked:
        assert ((ROOT / page).parent / path).exists(), path


@pytest.mark.slow
def test_the_benchmark_prints_its_table(tmp_path: Path) -> None:
    (command,) = (command for command in commands() if command.startswith(f"{BENCH} quantizer"))
    done = subprocess.run(
        shlex.split(command),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| 4096, 65536, 128 | simvq-moe SimVQ |" in done.stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_the_quickstart_runs_in_a_fresh_clone_and_skips_what_is_finished(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    first, again = (
        subprocess.run(
            ["bash", "launch/quickstart.sh"], cwd=clone, capture_output=True, text=True, check=False
        )
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr[-4000:]
    assert "SimVQ" in first.stdout
    assert again.returncode == 0
    assert "22 of 22 runs are finished and skipped" in again.stderr
    report = json.loads((clone / "runs/quickstart/report/report.json").read_text())
    arms = {arm["name"]: arm["mean"] for arm in report["groups"][0]["arms"]}
    assert arms["simvq"]["val/codes/used"] > 0.5 > 0.1 > arms["vq"]["val/codes/used"]
    assert arms["simvq"]["val/mse"] < min(arms["vq"]["val/mse"], arms["ema"]["val/mse"])
