"""The config: merged in order, strict, typed, and repeatable."""

from __future__ import annotations

from pathlib import Path

import pytest

from simvq_moe.config.checks import check
from simvq_moe.config.flags import with_flags
from simvq_moe.config.loading import (
    first_difference,
    flatten,
    key_names,
    merge_files,
    suggestion,
    to_yaml,
)
from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError


def load(tmp_path: Path, *texts: str) -> Config:
    files = [tmp_path / f"{i}.yaml" for i in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    return merge_files(Config, files)


def test_later_files_override_earlier_ones_and_flags_override_files(tmp_path: Path) -> None:
    config = load(tmp_path, "moe: {experts: 8, hidden: 32}", "moe: {experts: 16}")
    assert (config.moe.experts, config.moe.hidden, config.moe.top_k) == (16, 32, 4)
    flagged = with_flags(config, ["--moe.experts", "32", "--moe.top-k=2"], "train")
    assert (flagged.moe.experts, flagged.moe.hidden, flagged.moe.top_k) == (32, 32, 2)


def test_of_a_flag_given_twice_the_last_holds() -> None:
    flags = [
        "--seed",
        "1",
        "--seed",
        "2",
        "--audio_tokenizer.strides",
        "8",
        "--audio_tokenizer.strides",
        "4",
    ]
    config = with_flags(Config(), flags, "train")
    assert (config.seed, config.audio_tokenizer.strides) == (2, (4,))


def test_a_number_in_exponent_notation_is_a_float(tmp_path: Path) -> None:
    assert load(tmp_path, "optimizer: {lr: 3e-4}").optimizer.lr == 3e-4
    assert with_flags(Config(), ["--optimizer.lr", "3e-4"], "train").optimizer.lr == 3e-4


@pytest.mark.parametrize("flag", ["--local_rank=3", "--local_rank=0"])
def test_the_local_rank_of_a_launcher_is_ignored(flag: str) -> None:
    assert with_flags(Config(), [flag, "--seed", "5"], "train").seed == 5


def test_the_written_config_reads_back_equal(tmp_path: Path) -> None:
    flags = ["--moe.router.map.kind", "linear", "--moe.router.map.base_width", "8"]
    config = with_flags(Config(), [*flags, "--optimizer.lr", "7e-5"], "t")
    assert load(tmp_path, to_yaml(config)) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("moe: {exprets: 8}", ["unknown key moe.exprets", "Did you mean moe.experts"]),
        ("quantiser: {codes: 8}", ["unknown key quantiser", "Did you mean quantizer"]),
        ("moe: {experts: many}", ["moe.experts 'many'", "Integer"]),
        ("moe: 3", ["moe 3"]),
        ("quantizer: {kind: vqvae}", ["quantizer.kind 'vqvae'", "'simvq'"]),
        ("optimizer: {betas: [0.9]}", ["optimizer.betas [0.9]"]),
        ("moe: [", ["not readable YAML"]),
        ("- moe", ["must hold keys and values"]),
    ],
)
def test_a_bad_file_gets_one_line_with_key_value_and_way_out(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in ["0.yaml", *words]), message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--moe.exprets", "8"], ["--moe.exprets", "Did you mean moe.experts"]),
        (["--moe.experts", "many"], ["--moe.experts", "'many'"]),
        (["--quantizer.kind", "vqvae"], ["--quantizer.kind", "'vqvae'", "'simvq'"]),
        (["--moe.experts"], ["Missing value", "--moe.experts"]),
        (["stray"], ["stray"]),
        (["--seed", "1=2"], ["--seed", "'1=2'"]),
        (["--optimizer.lr", ""], ["--optimizer.lr"]),
        (["--moe.experts", "3", "4"], ["unknown 4"]),
        (["--optimizer.betas", "0.9"], ["--optimizer.betas", "2 values"]),
        (["--x\n\x1b[31m"], ["--x\\n\\x1b[31m"]),
        (["--" + "z" * 100_000], ["unknown --zzz"]),
    ],
)
def test_a_bad_flag_gets_one_line(flags: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        with_flags(Config(), flags, "train")
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in [*words, "--help"]), message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--moe.top_k", "4", "--moe.experts", "2"],
            "moe.top_k 4 > moe.experts 2: lower moe.top_k or raise moe.experts",
        ),
        (["--quantizer.codes", "1"], "quantizer.codes 1 < 2: use at least 2"),
        (["--optimizer.lr", "nan"], "optimizer.lr nan < 0: use at least 0"),
        (["--name", "../elsewhere"], "name '../elsewhere'"),
        (["--language_model.heads", "5"], "language_model.width 64 / language_model.heads 5"),
        (["--data.image_size", "30"], "data.image_size 30 does not divide by 2^2"),
    ],
)
def test_values_that_can_not_run_are_named(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(with_flags(Config(), flags, "train"))
    assert message in str(error.value)


def test_the_first_difference_names_key_and_both_values() -> None:
    other = with_flags(Config(), ["--moe.experts", "8"], "train")
    assert first_difference(Config(), other) == "moe.experts was 64 and is now 8"
    assert first_difference(other, other) is None


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("train.step", "train.steps"),
        ("train.lr", "optimizer.lr"),
        ("train.warmup", "optimizer.warmup_steps"),
        ("train.batch", "train.batch_size or train.eval_batch_size"),
        ("moe.rooter.kind", "moe.router.kind or moe.router.map.kind"),
        ("moe.whiten.kind", "moe.router.whiten.kind or moe.router.kind"),
        ("quantizer.code", "quantizer.codes"),
    ],
)
def test_the_likeliest_keys_are_named_and_no_unlike_one(wrong: str, meant: str) -> None:
    assert suggestion(wrong, sorted(key_names(Config))) == f" Did you mean {meant}?"


def test_help_has_a_line_for_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        with_flags(Config(), ["--help"], "train")
    printed = capsys.readouterr().out
    for key in flatten(Config()):
        assert f"--{key} " in printed
    words = " ".join(printed.replace("│", " ").split())
    assert words.count("The options below are those of 'simvq'.") == 1
    assert words.count("There are no options of 'none'.") >= 1
    bare = [line for line in printed.splitlines() if line.strip(" │").startswith("(default")]
    # tyro puts the default on a line of its own where a description fills the line before
    for line in bare:
        assert printed.splitlines()[printed.splitlines().index(line) - 1].strip(" │")[:2] != "--"
