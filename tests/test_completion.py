"""`completion`, in a real bash: commands, flags of any task and kind, files."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest

from simvq_moe.cli import COMMANDS
from simvq_moe.commands.completion import completion
from simvq_moe.errors import ConfigError


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "simvq-moe.bash"
    with file.open("w") as out, contextlib.redirect_stdout(out):
        assert completion(["bash"]) == 0
    return file


def completed(script: Path, *words: str, cwd: Path | None = None) -> set[str]:
    """What bash offers for the last of these words."""
    line = " ".join(f'"{word}"' for word in ("simvq-moe", *words))
    commands = f"""
        source {script}
        COMP_WORDS=({line}) COMP_CWORD={len(words)}
        function=$(complete -p simvq-moe | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        $function simvq-moe "{words[-1]}" ""
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    found = subprocess.run(
        ["bash", "-c", commands], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert found.returncode == 0, found.stderr
    return set(found.stdout.split())


def test_commands_are_completed(script: Path) -> None:
    assert completed(script, "") >= set(COMMANDS)
    assert completed(script, "re") == {"report", "recipes"}


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (("sweep", "--par"), {"--parallel"}),
        (("train", "--dry"), {"--dry-run"}),
        (("train", "--quantizer.ki"), {"--quantizer.kind"}),
        (("train", "--moe.balance.k"), {"--moe.balance.kind"}),
        (("generate", "--temp"), {"--temperature"}),
    ],
)
def test_flags_are_completed(script: Path, words: tuple[str, ...], flags: set[str]) -> None:
    assert completed(script, *words) == flags


def test_files_are_completed(script: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("")
    assert completed(script, "train", "--config", "mi", cwd=tmp_path) == {"mine.yaml"}
    assert completed(script, "report", "mi", cwd=tmp_path) == {"mine.yaml"}


def test_another_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="'csh' is no shell: use bash, zsh, tcsh"):
        completion(["csh"])
    assert capsys.readouterr().out == ""
