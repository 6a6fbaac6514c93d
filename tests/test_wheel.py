"""The wheel holds all that a user without the repository needs, in an empty folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.launching import ROOT, environment


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, built from this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(out / "site")
    return out / "site"


def run(site: Path, cwd: Path, *args: str) -> str:
    command = [sys.executable, "-m", "simvq_moe", *args]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment() | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_file_of_the_package_is_in_it_and_nothing_else(site: Path) -> None:
    ours = {
        path.relative_to(ROOT)
        for path in (ROOT / "simvq_moe").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    recipes = {
        "simvq_moe/recipes" / path.relative_to(ROOT / "configs")
        for path in (ROOT / "configs").rglob("*")
        if path.is_file()
    }
    found = {path.relative_to(site) for path in site.rglob("*") if path.is_file()}
    assert {path for path in found if ".dist-info" not in path.parts[0]} == ours | recipes


def test_a_recipe_is_listed_copied_out_and_trained(site: Path, tmp_path: Path) -> None:
    assert "language_quickstart" in run(site, tmp_path, "recipes")
    run(site, tmp_path, "init", "image_quickstart")
    short = ("--config", "image_quickstart.yaml", "--name", "first", "--train.steps", "2")
    run(site, tmp_path, "train", *short, "--train.eval_every", "2")
    assert (tmp_path / "runs" / "first" / "summary.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image_quickstart.yaml", "runs"]
