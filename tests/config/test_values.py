"""Every value of a config means something, or is refused in one line that names its key."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simvq_moe.config.checks import check
from simvq_moe.config.checks_values import LIST
from simvq_moe.config.flags import with_flags
from simvq_moe.config.loading import flatten, merge_files, to_yaml, with_overrides
from simvq_moe.config.quantizer import QuantizerOptions
from simvq_moe.config.ranges import SEED, ranges_of
from simvq_moe.config.registry import kinds
from simvq_moe.config.schema import Config
from simvq_moe.costs.estimate import estimate
from simvq_moe.errors import ConfigError
from simvq_moe.quantizers.kinds.simvq import SimVQOptions
from tests.files.test_yaml import TEXT

CONFIGS = [
    with_overrides(Config(), {"quantizer": {"kind": kind}}, "here")
    for kind in kinds(QuantizerOptions)
]
"""A config of every kind of component."""
LEAVES = {key: value for config in CONFIGS for key, value in flatten(config).items()}
RANGES = {key: bounds for config in CONFIGS for key, bounds in ranges_of(config).items()}
HAS = {key: config for config in (*CONFIGS, Config()) for key in flatten(config)}
"""A config that has the key, the default one where it does."""


def kind_of(key: str) -> str:
    """The annotation of a leaf."""
    *path, leaf = key.split(".")
    holder: Any = HAS[key]
    for part in path:
        holder = getattr(holder, part)
    return str(get_type_hints(type(holder))[leaf])


FREE = [key for key in LEAVES if "Literal" not in kind_of(key)]
NUMBERS = [key for key in FREE if any(word in kind_of(key) for word in ("int", "float"))]
TEXTS = [key for key in FREE if "str" in kind_of(key)]
LISTS = [key for key, value in LEAVES.items() if isinstance(value, tuple)]
HUGE = (10**39, 2**130, -(10**39), math.nan, math.inf, -math.inf, 1e39, "1e39", "nan", "-inf")


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def said(key: str, value: Any) -> str | None:
    """The line in which a value is refused; None: it is accepted."""
    if key in LISTS and not isinstance(value, list):
        value = [value, value] if key == "optimizer.betas" else [value]
    line = None
    try:
        check(with_overrides(HAS[key], nested(key, value), "flags"))
    except ConfigError as error:
        line = str(error)
    assert line is None or "\n" not in line
    return line


def test_every_number_has_its_range_and_nothing_else_has() -> None:
    assert set(RANGES) == set(NUMBERS)


@pytest.mark.parametrize("value", HUGE, ids=str)
@pytest.mark.parametrize("key", RANGES)
def test_a_number_without_bounds_is_refused_by_its_key(key: str, value: Any) -> None:
    line = said(key, value)
    assert line is not None
    assert f"{key} " in line


@pytest.mark.parametrize("value", [-1, 0, 1, 2, "x", "", True, None, [], [1, 2], "1e400"], ids=str)
@pytest.mark.parametrize("key", RANGES)
def test_a_small_number_or_none_is_accepted_or_refused_by_its_key(key: str, value: Any) -> None:
    line = said(key, value)
    assert line is None or key in line


@pytest.mark.parametrize("value", ["", " ", "a\0b", "a\nb", "\x1b[31m", "\ud800", 1.5, True, ["a"]])
@pytest.mark.parametrize("key", TEXTS)
def test_text_that_is_empty_or_unprintable_is_refused_by_its_key(key: str, value: Any) -> None:
    if key in LISTS and value == ["a"]:
        value = "a"
    line = said(key, value) if value != "a" else f"{key} a"
    assert line is not None
    assert f"{key} " in line


@pytest.mark.parametrize("key", LISTS)
def test_a_list_has_an_end(key: str) -> None:
    line = said(key, [1] * (LIST + 1))
    assert line is not None
    assert key in line


@given(st.sampled_from(sorted(LEAVES)), st.integers() | st.floats() | TEXT | st.none())
@settings(deadline=None)
def test_any_value_is_accepted_or_refused_in_one_line_that_names_its_key(
    key: str, value: Any
) -> None:
    line = said(key, value)
    assert line is None or key in line


@given(st.builds(dict, name=TEXT, arm=TEXT | st.none(), runs_dir=TEXT), st.integers(), st.floats())
@settings(deadline=None)
def test_a_saved_config_reads_back_equal_whatever_its_text(
    tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str], seed: int, lr: float
) -> None:
    overrides = texts | {"seed": seed, "optimizer": {"lr": 0.0 if math.isnan(lr) else lr}}
    overrides |= {"data": {"sources": [texts["name"], texts["runs_dir"]]}}
    config = with_overrides(Config(), overrides, "flags")
    file = tmp_path_factory.mktemp("saved") / "config.yaml"
    file.write_text(to_yaml(config))
    assert merge_files(Config, [file]) == config


@pytest.mark.parametrize(
    "text", ["${oc.env:HOME}", "a${b}", "${name}", "\\${x}", "???", "1e3", "~"]
)
def test_text_of_a_flag_is_as_it_stands_and_stays_so(text: str, tmp_path: Path) -> None:
    config = with_flags(Config(), ["--arm", text], "train")
    assert config.arm == text
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert merge_files(Config, [tmp_path / "c.yaml"]) == config


@pytest.mark.parametrize("text", ["arm: ${oc.env:HOME}", "arm: ${nowhere}", "arm: ${seed}"])
def test_nothing_in_a_file_is_resolved(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"{text}\ndata: {{source: '{text}'}}")
    config = merge_files(Config, [tmp_path / "c.yaml"])
    assert (config.arm, config.data.source) == (text.removeprefix("arm: "), text)


@pytest.mark.parametrize(
    ("word", "value"), [("1e3", 1000), ("1_000", 1000), ("1000.0", 1000), ("007", 7), ("+5", 5)]
)
def test_a_whole_number_may_be_written_in_any_way(word: str, value: int, tmp_path: Path) -> None:
    for text in (word, f"'{word}'"):
        (tmp_path / "c.yaml").write_text(f"quantizer: {{codes: {text}}}")
        assert merge_files(Config, [tmp_path / "c.yaml"]).quantizer.codes == value
    flags = ["--quantizer.codes", word, "--quantizer.base_width", word]
    flagged = with_flags(Config(), flags, "train").quantizer
    assert isinstance(flagged, SimVQOptions)
    assert (flagged.codes, flagged.base_width) == (value, value)


@pytest.mark.parametrize(("word", "value"), [("true", True), ("False", False), ("yes", None)])
def test_truth_is_written_as_in_python_or_as_in_yaml(word: str, value: bool | None) -> None:
    flags = ["--train.compile", word]
    if value is None:
        with pytest.raises(ConfigError, match=r"--train\.compile: 'yes' is neither True nor False"):
            with_flags(Config(), flags, "train")
    else:
        assert with_flags(Config(), flags, "train").train.compile is value


@pytest.mark.parametrize("word", ["1.5", "1e", "0x", "many", "nan", "1e400", "9" * 5000, "true"])
def test_what_is_no_whole_number_is_refused_by_its_key(word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--quantizer\.codes"):
        with_flags(Config(), ["--quantizer.codes", word], "train")
    (tmp_path / "c.yaml").write_text(f"quantizer: {{codes: '{word}'}}")
    with pytest.raises(ConfigError, match=r"quantizer\.codes .*Integer expected"):
        merge_files(Config, [tmp_path / "c.yaml"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arm: 1.10", ["arm 1.1", "quotes"]),
        ("arm: off", ["arm False", "quotes"]),
        ("data: {sources: a}", ["data.sources 'a'", "list"]),
        ("data: {source: [a]}", ["data.source ['a']", "one value"]),
        ("optimizer: {betas: [0.9]}", ["optimizer.betas [0.9]", "2 values expected, not 1"]),
        ("optimizer: {betas: 0.9}", ["optimizer.betas 0.9", "list"]),
        ("moe: null", ["moe None", "keys and values"]),
        ("quantizer: {bias: 1}", ["quantizer.bias 1", "true or false"]),
        ("train: {zero_stage: 7}", ["train.zero_stage 7", "0, 1, 2, 3"]),
        ("moe: {codes: 3}", ["unknown key moe.codes", "quantizer.codes"]),
        ("{1: 2}", ["unknown key 1"]),
    ],
)
def test_a_value_of_another_type_is_named_with_what_is_meant(
    text: str, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        merge_files(Config, [tmp_path / "c.yaml"])
    assert all(word in str(error.value) for word in ["c.yaml: ", *words]), str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        *(".", "./.", "a/.", "a/./b", "..", "a/../b", "../a", "/a", "a/", "//", "a//b", "", " "),
        *("-a", ".hidden", "a/.b", "a b", "a\n", "a\0", "\x1b[1m", "~", "~/a", "$HOME", "a\\b"),
        *(
            "x" * 256,
            "/".join(["abcdefgh"] * 200),
            "report",
            "a/Report",
            "checkpoints",
            "a/samples",
        ),
        *("tensorboard", "a:b", "*", "\u202e", "\ud800"),
    ],
)
def test_a_name_is_one_plain_path_below_the_folder_of_runs(name: str) -> None:
    line = said("name", name)
    assert line is not None
    assert "name " in line


@pytest.mark.parametrize("name", ["a", "a/b/c", "a.b+c=d-e_f", "2", "_x", "größe", "reports"])
def test_plain_names_are_accepted(name: str) -> None:
    assert said("name", name) is None


def test_the_largest_seed_is_one_that_generators_take() -> None:
    assert said("seed", SEED) is None
    assert said("data.seed", SEED) is None


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ("image_tokenizer", "quantizer.codes"),
        ("image_tokenizer", "data.image_size"),
        ("audio_tokenizer", "audio_tokenizer.hidden"),
        ("language_model", "language_model.width"),
        ("language_model", "moe.experts"),
    ],
)
def test_the_largest_value_is_estimated_or_refused_by_its_key(task: str, key: str) -> None:
    config = with_overrides(Config(), {"task": task} | nested(key, int(RANGES[key].most)), "flags")
    check(config)
    line = ""
    try:
        estimate(config, 1, None)
    except ConfigError as error:
        line = str(error)
    assert not line or f"{key} {int(RANGES[key].most)}" in line
