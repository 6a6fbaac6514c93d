"""Every command and program of the pages in docs/ runs, in order, shortened where it would train
for minutes."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import soundfile
from PIL import Image

from simvq_moe.cli import main
from simvq_moe.config.checks import check
from simvq_moe.config.schema import Config
from simvq_moe.engine.world import World
from simvq_moe.sweeps.plan import plan
from tests.launching import ROOT, run_forked
from tests.test_dependencies import declared
from tests.test_readme import BENCH, commands_of, shortened, starts_and_stops
from tests.test_readme import PAGES as IN_ORDER


def test_the_table_of_extras_is_that_of_the_package() -> None:
    page = (ROOT / "docs/start.md").read_text()
    table = page.partition("| extra |")[2].partition("\n\n")[0]
    rows = [row for row in table.splitlines()[2:] if not row.startswith("| none |")]
    told = [name for row in rows for name in re.findall(r"`([\w-]+)`", row.split("|")[1])]
    assert sorted(told) == sorted(extra for extra in declared() if extra)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_extras_that_a_page_names_are_declared(page: Path) -> None:
    named = re.findall(r"(?:simvq-moe|\.)\[([\w,]+)\]", page.read_text())
    assert {extra for names in named for extra in names.split(",")} <= declared().keys()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_flags_in_the_sentences_of_a_page_are_keys_of_a_config(page: Path) -> None:
    components = (ROOT / "docs" / "components.md").read_text()
    options = {"kind", *re.findall(r"^\| `(\w+)`", components, re.MULTILINE)}
    sections = get_type_hints(Config)
    for flag in re.findall(r"--([a-z_]+(?:\.[a-z_]+)+)", page.read_text()):
        section, *_, key = flag.split(".")
        named = sections[section]
        known = {one.name for one in fields(named)} if is_dataclass(named) else set()
        mine = page.name == "plugins.md" and key == "sharpness"  # of the router that it shows
        assert key in known | options or mine, flag


def test_the_sweep_that_a_page_shows_would_start(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    runs = plan([tmp_path / "mine.yaml"]).runs
    assert len(runs) == 12
    for run in runs:
        check(run.config)


def blocks(page: str) -> list[tuple[str, str]]:
    text = (ROOT / "docs" / page).read_text()
    return re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL)


ALONE = [
    page.name
    for page in sorted((ROOT / "docs").glob("*.md"))
    if f"docs/{page.name}" not in (*IN_ORDER, "docs/plugins.md") and blocks(page.name)
]
"""Every page with commands or programs that needs nothing of another page. That of plug-ins shows a
file, which the tests of plug-ins run."""


def test_the_router_that_a_page_shows_is_the_one_that_is_tested() -> None:
    ((language, block),) = blocks("plugins.md")
    assert (language, block) == ("python", (ROOT / "tests/moe/my_router.py").read_text())


@pytest.mark.parametrize("page", ALONE)
def test_the_commands_and_programs_of_a_page_run_in_order(
    page: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    del world
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "runs").mkdir()
    write_own_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for language, block in blocks(page):
        if language == "python":
            exec(compile(block, page, "exec"), names)
            continue
        for command in commands_of(block):
            run_command(command, tmp_path)


def write_own_data(folder: Path) -> None:
    """The folders that pages call photos_folder, texts_folder and speech_folder."""
    rng = np.random.default_rng(0)
    photos, texts, speech = (folder / f"{name}_folder" for name in ("photos", "texts", "speech"))
    for one in (photos, texts, speech):
        one.mkdir()
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).save(photos / f"{i}.png")
        soundfile.write(speech / f"{i}.wav", rng.normal(0, 0.1, 8000), 8000)
    source = (ROOT / "simvq_moe/core/usage.py").read_text()
    for i in range(200):  # a stream has files of its own for each of the 16 samples of a batch
        (texts / f"{i}.txt").write_text(f"{i}\n{source[:4000]}")


def run_command(command: str, folder: Path) -> None:
    if command.startswith((BENCH, "launch/")):
        return  # minutes, and installations: `test_readme` and `test_launch` have them
    program, *words = shortened(command)
    assert program == "simvq-moe"
    if words[0] == "dashboard":
        starts_and_stops([program, *words, "--port", "0"], folder)
    elif words[0] == "train" and "--dry-run" not in words:
        done = run_forked(*words, cwd=folder)  # it ends its group of ranks
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    else:
        assert main(words) == 0, command
