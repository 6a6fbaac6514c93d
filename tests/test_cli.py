"""Bad input: exit code 2, one clear line on standard error, nothing written."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from simvq_moe.cli import main
from simvq_moe.commands.models import GenerateArgs
from simvq_moe.config.docs import field_docs
from simvq_moe.config.loading import to_yaml
from simvq_moe.config.schema import Config
from simvq_moe.tasks import codes, text

SWEEP = """
name: s
title: t
seeds: [0]
groups:
  g: {question: q, config: base.yaml, baseline: a, outcomes: [val/mse], arms: {a: {label: A}}}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a config, a sweep, and folders of unreadable data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("quantizer: {codes: 16}\n")
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    bad = SWEEP.replace("label: A", "label: A, set: {quantizer: {codes: 1}}")
    (tmp_path / "bad.yaml").write_text(bad)
    (tmp_path / "refers.yaml").write_text("data: {source: '${nowhere}'}\n")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "a.png").write_bytes(b"no picture")
    (tmp_path / "runs" / "other").mkdir(parents=True)
    (tmp_path / "runs" / "other" / "config.yaml").write_text(to_yaml(Config(name="other")))
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train --moe.exprets 8", ["--moe.exprets", "Did you mean moe.experts"]),
        ("train --train.warmup 5", ["--train.warmup 5", "Did you mean optimizer.warmup_steps?"]),
        ("train --moe.experts many", ["--moe.experts", "many"]),
        ("train --moe.top_k 3 --moe.experts 2", ["moe.top_k 3 > moe.experts 2"]),
        ("train --moe.experts 8", ["moe.experts 8 with task 'image_tokenizer'", "drop it"]),
        (
            "train --task language_model --quantizer.kind vq",
            ["only 'audio_tokenizer' and 'image_tokenizer' have it"],
        ),
        ("train --quantizer.codes 1", ["quantizer.codes 1", "at least 2"]),
        ("train --data.source nowhere", ["data.source", "nowhere", "photos"]),
        ("train --data.source nothing", ["data.source", "nothing"]),
        ("train --task language_model --data.source nowhere", ["data.source", "nowhere"]),
        ("train --name other --seed 3", ["runs/other", "seed was 0 and is now 3", "--name"]),
        ("train --config missing.yaml", ["--config missing.yaml does not exist"]),
        ("train --config", ["--config"]),
        ("sweep --config missing.yaml", ["missing.yaml does not exist"]),
        ("sweep", ["--config"]),
        ("sweep --config sweep.yaml --ranks 3", ["train.batch_size 32", "3 ranks"]),
        ("sweep --config base.yaml", ["unknown key quantizer"]),
        ("sweep --config sweep.yaml --arms b", ["--arms 'b' is in no group"]),
        ("sweep --config sweep.yaml --parallel 0", ["--parallel 0 must be at least 1"]),
        ("sweep --config sweep.yaml --index 2 --count 2", ["--index 2", "--count 2"]),
        ("sweep --config sweep.yaml --ranks 0", ["--ranks 0 must be at least 1"]),
        ("sweep --config sweep.yaml --count 0", ["--count 0", "at least 1"]),
        ("sweep --config sweep.yaml --arms ,", ["--arms '' is in no group"]),
        ("sweep --config bad.yaml", ["bad.yaml: groups.g.arms.a: quantizer.codes 1 < 2"]),
        ("train --seed 1e30", ["seed 10000", "use at most"]),
        ("train --name .", ["name '.'"]),
        ("train --config refers.yaml", ["data.source '${nowhere}' does not exist"]),
        ("train --config .", [". is no regular file"]),
        ("generate runs/other --seed 99999999999999999999999", ["--seed 9999", "use at most"]),
        ("generate runs/other --temperature nan", ["--temperature nan"]),
        ("dashboard runs --port -1", ["--port -1 < 0"]),
        ("dashboard runs --port 65536", ["--port 65536 > 65,535"]),
        ("bench moe --rounds 0", ["--rounds 0"]),
        ("bench train --steps -1", ["--steps -1"]),
        ("watch nowhere", ["nowhere does not exist"]),
        ("report nowhere --out out", ["nowhere"]),
        ("report nothing --out out", ["nothing"]),
        ("report --out out", ["report needs runs"]),
        ("report runs --out ''", ["--out", "'' is empty", "give a path"]),
        ("train --config ''", ["--config", "'' is empty"]),
        ("eval ''", ["'' is empty"]),
        ("dashboard nowhere", ["nowhere does not exist"]),
        ("bench quantiser", ["quantiser", "quantizer"]),
        ("trian", ["unknown command 'trian'", "Did you mean train"]),
    ],
)
def test_bad_input_exits_2_with_one_line_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], command: str, words: list[str]
) -> None:
    before = files(here)
    assert main(shlex.split(command)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert all(word in captured.err for word in ["simvq-moe: ", *words]), captured.err
    assert files(here) == before
    assert not (here / "runs" / "run").exists()


def test_ranks_that_do_not_divide_the_batch_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["train"]) == 2
    assert "train.batch_size 32 does not divide by 3 ranks" in capsys.readouterr().err
    assert not (here / "runs" / "run").exists()


@pytest.mark.usefixtures("here")
def test_only_the_first_rank_prints_the_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--quantizer.codes", "1"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("WORLD_SIZE")  # of a process that inherits its rank, and is alone
    assert main(["train", "--quantizer.codes", "1"]) == 2
    assert "quantizer.codes 1" in capsys.readouterr().err


def test_a_dry_run_prints_the_parameters_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", "base.yaml", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert '"total"' in captured.out
    assert "codes: 16" in captured.err
    assert not (here / "runs" / "run").exists()


def test_doctor_finds_everything_on_a_machine_that_runs_the_tests(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor"]) == 0
    assert "everything needed is here" in capsys.readouterr().err


def test_the_help_of_generate_says_the_temperatures_of_the_tasks() -> None:
    said = f"None: {text.TEMPERATURE:g} for text, {codes.TEMPERATURE:g} for codes"
    assert said in field_docs(GenerateArgs)["temperature"]


@pytest.mark.parametrize(
    ("words", "sections"),
    [
        ((), {"quantizer", "image_tokenizer"}),
        (("--task", "language_model"), {"language_model", "moe"}),
        (("--config", "configs/language_quickstart.yaml"), {"language_model", "moe"}),
        (("all",), {"quantizer", "image_tokenizer", "audio_tokenizer", "language_model", "moe"}),
    ],
)
def test_the_help_of_train_shows_the_fields_of_the_task_or_all(
    words: tuple[str, ...], sections: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--help", *words])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    ones = {"quantizer", "image_tokenizer", "audio_tokenizer", "language_model", "moe"}
    assert {one for one in ones if f"--{one}." in printed} == sections
    assert "--optimizer.lr " in printed
    assert ("--help all prints" in printed.splitlines()[-1]) == (words != ("all",))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "export runs/x",
            "Missing from simvq-moe export: --to {hf,safetensors} --out PATH. --help",
        ),
        ("fold", "Missing from simvq-moe fold: PATH --out PATH. --help lists every flag"),
        ("init", "init needs a recipe or 'launch': simvq-moe recipes lists them"),
    ],
)
def test_what_is_missing_is_named_without_its_help(
    command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    assert said in capsys.readouterr().err
