"""YAML is plain data, whoever wrote it: nothing resolved, all bounded, what is written read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simvq_moe.files.regular import BrokenFileError
from simvq_moe.files.yaml import DEPTH, SIZE, VALUES, parse_yaml, plain_yaml, read_yaml

LOOKS_LIKE_SOMETHING_ELSE = (
    *("null", "~", "", "yes", "On", "no", "1e3", "1_000", "007", "0x10", "1:30", "2024-01-01"),
    *(
        "=",
        "<<",
        "${a}",
        "${oc.env:HOME}",
        "???",
        "- x",
        "#",
        "a: b",
        "!x",
        "&a",
        "*a",
        "---",
        ".inf",
    ),
    *("\x85", "\u2028", "\ud800", "\ufeff", "\r\n", " ", "a\n b", "\t", "\x1b[31m", "\U0001f600"),
)
TEXT = st.text(st.characters()) | st.sampled_from(LOOKS_LIKE_SOMETHING_ELSE)
VALUE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
TREE = st.dictionaries(
    TEXT,
    st.recursive(
        VALUE,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)


@settings(deadline=None)
@given(TREE)
def test_what_is_written_reads_back_equal(tree: dict[str, Any]) -> None:
    written = plain_yaml(tree)
    written.encode()
    assert parse_yaml(written, "text") == tree


@settings(deadline=None)
@given(st.text() | st.text(alphabet="[]{}:,-?&*!|>'\"%@` \n#<a0.~e\\xuU9"))
def test_any_text_is_plain_data_or_one_line_of_error(text: str) -> None:
    said = ""
    try:
        parse_yaml(text, "text")
    except BrokenFileError as error:
        said = str(error)
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: ${oc.env:HOME}", "${oc.env:HOME}"),
        ("a: ${b}", "${b}"),
        ("a: ???", "???"),
        ("a: 2024-01-01", "2024-01-01"),
        ("a: 010", "010"),
        ("a: 1:30", "1:30"),
        ("a: 1e3", 1000.0),
        ("a: 3e-4", 3e-4),
        ("a: 8_192", 8192),
        ("a: 2026_11_30", "2026_11_30"),
        ("a: 1_0", "1_0"),
        ("a: off", False),
        ("a:", None),
    ],
)
def test_a_value_is_read_as_it_stands(text: str, value: Any) -> None:
    found = parse_yaml(text, "text")
    assert found == {"a": value}
    assert type(found["a"]) is type(value)


def test_keys_are_text_and_aliases_and_merge_keys_are_read() -> None:
    text = "base: &base {lr: 1, steps: 2}\non: {<<: *base, steps: 3}\n512: *base"
    base = {"lr": 1, "steps": 2}
    assert parse_yaml(text, "text") == {"base": base, "on": {"lr": 1, "steps": 3}, "512": base}


def test_a_mapping_that_was_merged_may_be_merged_again_from_wherever_it_stands() -> None:
    text = "a: &a {x: 1, y: 1}\nb: {inner: &inner {<<: *a, x: 2}}\nc: {<<: *inner, y: 3}"
    found = parse_yaml(text, "text")
    assert found == {"a": {"x": 1, "y": 1}, "b": {"inner": {"x": 2, "y": 1}}, "c": {"x": 2, "y": 3}}


def bomb() -> str:
    levels = [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    return "\n".join(["a0: &a0 [x,x,x,x,x,x,x,x,x]", *levels])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *(("a: " + "[" * n, ["readable"]) for n in (20, 500, 100_000)),
        *(("a: " + "[" * n + "]" * n, [f"{DEPTH} levels"]) for n in (DEPTH, 100_000)),
        ("a: " + "{a: " * 100_000, [f"{DEPTH} levels"]),
        ("\n".join("  " * i + "a:" for i in range(600)), [f"{DEPTH} levels"]),
        (bomb(), [f"{VALUES:,} values"]),
        ("[" + "0," * VALUES + "]", [f"{VALUES:,} values"]),
        ("a: &a [*a]", ["stands within itself"]),
        ("a: &a {<<: *a}", ["stands within itself"]),
        ("a: *b", ["undefined alias"]),
        ("a: 1\na: 2", ["key a twice", "line 2"]),
        ("a: {<<: {b: 1, b: 2}}", ["key b twice"]),
        ("[a]: 1", ["a key that is no text"]),
        ("a: " + "9" * 5000, ["digits"]),
        ('a: "\\UFFFFFFFF"', ["readable"]),
        ("a: 1\n--- \nb: 2", ["single document"]),
        ("a: !!python/object/apply:os.system [echo]", ["tag", "os.system"]),
        ("a: !!int x", ["tag"]),
        ("a: \x00", ["readable"]),
    ],
)
def test_what_is_not_plain_or_not_bounded_is_one_line(text: str, words: list[str]) -> None:
    with pytest.raises(BrokenFileError) as error:
        parse_yaml(text, "some.yaml")
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in ["some.yaml", *words]), str(error.value)


@pytest.mark.parametrize("text", ["- a", "a", "3", "true", '"a: b"'])
def test_a_file_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(BrokenFileError, match="keys and values"):
        read_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize("text", ["", "# only words", "---", "null"])
def test_an_empty_file_holds_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert read_yaml(tmp_path / "c.yaml") == {}


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b"#" * (SIZE + 1))
    os.mkfifo(tmp_path / "fifo")
    for name in ("bytes", "large", "fifo", "missing", "."):
        with pytest.raises(BrokenFileError):
            read_yaml(tmp_path / name)
