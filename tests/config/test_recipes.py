"""Recipes come with the package: by name, from any folder, listed, copied out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from simvq_moe.cli import main
from simvq_moe.config.loading import merge_files
from simvq_moe.config.recipes import folder, recipe_file, recipes
from simvq_moe.config.schema import Config
from simvq_moe.sweeps.plan import plan
from tests.launching import ROOT


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["image_quickstart", "image_quickstart.yaml", "configs/image_quickstart.yaml"],
)
def test_a_recipe_is_found_by_name_from_any_folder(name: str) -> None:
    file = ROOT / "configs/image_quickstart.yaml"
    assert recipe_file(Path(name)) == file
    assert merge_files(Config, [Path(name)]) == merge_files(Config, [file])


def test_a_file_of_the_user_comes_before_a_recipe_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "image_quickstart.yaml").write_text("seed: 77\n")
    assert merge_files(Config, [Path("image_quickstart.yaml")]).seed == 77


@pytest.mark.parametrize("path", ["nothing", "../pyproject", "/image_quickstart", "."])
def test_what_is_no_recipe_stays_a_path(path: str) -> None:
    assert recipe_file(Path(path)) == Path(path)


def test_every_config_and_sweep_is_listed_with_what_its_header_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {recipe.name: recipe for recipe in recipes()}
    files = [*folder().glob("*.yaml"), *folder().glob("sweeps/*.yaml")]
    assert found.keys() == {f.relative_to(folder()).with_suffix("").as_posix() for f in files}
    one = found["sweeps/quickstart"]
    assert one.question.startswith("what is a shared map good for")
    assert one.command.startswith("simvq-moe sweep --config")
    assert "2 CPU cores. Minutes:" in one.hardware
    assert "held-out MSE" in one.expect
    assert "\n" not in one.expect
    assert main(["recipes"]) == 0
    assert one.question in capsys.readouterr().out


def test_a_sweep_is_planned_by_name_and_from_its_copy(tmp_path: Path) -> None:
    by_name = plan([Path("sweeps/quickstart")])
    assert main(["init", "sweeps/quickstart", "--out", "mine/own.yaml"]) == 0
    copied = plan([tmp_path / "mine/own.yaml"])
    assert [run.config for run in by_name.runs] == [run.config for run in copied.runs]


def test_a_copy_says_the_command_that_runs_the_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for recipe, command in (
        ("image_quickstart", "simvq-moe train --config mine.yaml"),
        ("sweeps/moe", "simvq-moe sweep --config mine.yaml --ranks 2"),
        (
            "sweeps/moe_gpu",
            "simvq-moe sweep --config configs/sweeps/moe.yaml --config mine.yaml --ranks 8",
        ),
    ):
        assert main(["init", recipe, "--out", "mine.yaml"]) == 0
        assert capsys.readouterr().err == f"init: mine.yaml; it runs by {command}\n"
        assert f"# Command:  {command}\n" in (tmp_path / "mine.yaml").read_text()
        (tmp_path / "mine.yaml").unlink()


@pytest.mark.parametrize("name", ["a\nb: 1.yaml", os.fsdecode(b"caf\xe9.yaml")])
def test_a_copy_whose_name_its_header_could_not_say_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "image_quickstart", "--out", name]) == 2
    assert "has characters that can't be printed" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_copy_is_refused_where_it_would_lie_on_a_file_and_for_no_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "image_quickstart"]) == 0
    assert (tmp_path / "image_quickstart.yaml").is_file()
    capsys.readouterr()
    for command, words in (
        ("init image_quickstart", "image_quickstart.yaml is there already"),
        ("init image_quickstrat --out x.yaml", "is no recipe: use one of audio_16khz_gpu"),
        ("train --config sweeps/quickstart", "title is a key of a sweep's file: use `simvq-moe sw"),
        ("sweep --config language_s64", "task is a key of a run's config: use `simvq-moe train`"),
        ("train --config nothing.yaml", "or a recipe that `simvq-moe recipes` lists"),
    ):
        assert main(command.split()) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "x.yaml").exists()


def test_the_twin_of_a_recipe_is_no_part_of_what_it_needs() -> None:
    (twin,) = (one for one in recipes() if one.name == "sweeps/image_128_gpu")
    assert "Twin" not in " ".join((twin.hardware, twin.expect, twin.command))
