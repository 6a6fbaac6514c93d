"""The wheel holds all that a user without the repository needs, in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from simvq_moe.config.recipes import OF_A_CLONE
from tests.launching import ROOT, environment
from tests.test_dependencies import BASE, USE


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
    scripts = {
        "simvq_moe/launch" / path.relative_to(ROOT / "launch")
        for path in (ROOT / "launch").iterdir()
        if path.name not in OF_A_CLONE
    }
    found = {path.relative_to(site) for path in site.rglob("*") if path.is_file()}
    assert {path for path in found if ".dist-info" not in path.parts[0]} == ours | recipes | scripts


def test_a_recipe_is_listed_copied_out_and_trained(site: Path, tmp_path: Path) -> None:
    assert "language_quickstart" in run(site, tmp_path, "recipes")
    run(site, tmp_path, "init", "image_quickstart")
    short = ("--config", "image_quickstart.yaml", "--name", "first", "--train.steps", "2")
    run(site, tmp_path, "train", *short, "--train.eval_every", "2")
    assert (tmp_path / "runs" / "first" / "summary.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image_quickstart.yaml", "runs"]


def test_launch_scripts_are_copied_out_and_run_where_there_is_no_clone(
    site: Path, tmp_path: Path
) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    run(site, project, "init", "launch")
    for script in (project / "launch").iterdir():
        assert os.access(script, os.X_OK)
    small = ("--train.steps", "1", "--data.crops", "8", "--data.held_out_crops", "8")
    done = subprocess.run(
        [
            project / "launch/local.sh",
            "1",
            "--config",
            "image_quickstart",
            "--name",
            "first",
            *small,
        ],
        cwd=elsewhere,
        env=environment() | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (project / "runs/first/summary.json").is_file()
    assert not (project / ".venv").exists()


def python(minor: int) -> str:
    """A Python 3 of this minor version, of the PATH or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [shutil.which(f"python3.{minor}"), *pyenv.glob(f"3.{minor}.*/bin/python")]
    for one in filter(None, found):
        # pyenv leaves names in the PATH that do not run
        done = subprocess.run([one, "-c", "import venv"], capture_output=True, check=False)
        if done.returncode == 0:
            return str(one)
    pytest.skip(f"there is no python3.{minor}")


@pytest.mark.parametrize("minor", range(10, 15))
def test_another_python_compiles_all_and_uses_the_base_where_it_has_torch(
    minor: int, site: Path, tmp_path: Path
) -> None:
    other = python(minor)
    variables = environment() | {"PYTHONPATH": str(site)}
    variables["PYTHONPYCACHEPREFIX"] = str(tmp_path / "compiled")

    def done(*args: str) -> str:
        command = [other, *args]
        found = subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    done("-W", "error", "-m", "compileall", "-q", str(site / "simvq_moe"))
    assert "train" in done("-m", "simvq_moe", "--help")
    find = "import importlib.util as u, sys; print(all(map(u.find_spec, sys.argv[1:])))"
    if done("-c", find, *BASE) == "True\n":
        done("-c", USE)
