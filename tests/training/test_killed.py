"""Commands on finished runs, killed at any moment: the same command goes on to the same files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simvq_moe.cli import main
from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.files.unfinished import MARK, check_free, filling
from tests.killing import killed_at
from tests.short_training import train_two_steps

FLAGS = ("--quantizer.codes", "16", "--image_tokenizer.hidden", "4", "--data.image_size", "8")
COMMANDS = {
    "fold": ("fold", "runs/run"),
    "encode": ("encode", "runs/run", "--shard_samples", "40"),
    "decode": ("decode", "codes", "--limit", "2"),
    "generate": ("generate", "lm/run", "--samples", "2"),
}
LANGUAGE = (
    *("--task", "language_model", "--moe.experts", "4", "--moe.top_k", "2", "--moe.hidden", "4"),
    *("--language_model.layers", "1", "--language_model.width", "8", "--train.probe_tokens", "0"),
    *("--language_model.heads", "2", "--train.batch_size", "4"),
)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    """A folder with the run of a tokenizer, its codes, and a language model on them."""
    from simvq_moe.tasks.codes import CodesTask

    folder = tmp_path_factory.mktemp("here")
    (folder / "images").mkdir()
    for i in range(20):
        noise = np.random.default_rng(i).integers(256, size=(9, 12, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"images/{i:02}.png")
    flags = (*FLAGS, "--data.source", str(folder / "images"))
    train_two_steps(with_flags(Config(), flags, "train"), folder / "runs", world)
    assert main(["encode", str(folder / "runs/run"), "--out", str(folder / "codes")]) == 0
    flags = (*LANGUAGE, "--data.source", str(folder / "codes"))
    config = with_flags(Config(), flags, "train")
    train_two_steps(CodesTask.fit_to_data(config), folder / "lm", world)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_was_killed_at_any_moment_goes_on(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    out = here / f"out_{name}"
    command = [*COMMANDS[name], "--out", str(out)]
    assert main(command) == 0
    whole = content(out)
    assert whole
    assert MARK not in whole
    number = 0
    shutil.rmtree(out)
    while killed_at(number, out, lambda: main(command)):
        assert main(command) == 0, f"killed at touch {number}"
        assert content(out) == whole, f"killed at touch {number}"
        number += 1
        shutil.rmtree(out)
    assert number > 5


def test_a_folder_is_gone_on_with_only_by_the_command_that_left_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyError), filling(out, "decode", {"limit": 1}):
        raise KeyError
    check_free(out)
    with (
        pytest.raises(ConfigError, match="limit was 1 and is now 2"),
        filling(out, "decode", {"limit": 2}),
    ):
        raise AssertionError
    with filling(out, "decode", {"limit": 1}):
        (out / "a.png").write_bytes(b"a")
    assert content(out) == {"a.png": b"a"}
    with pytest.raises(ConfigError, match="is not empty"):
        check_free(out)
    (out / "a.png").rename(tmp_path / "file")
    with pytest.raises(ConfigError, match="is not empty"):
        check_free(tmp_path / "file")
