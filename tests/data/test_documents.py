"""Files of every kind give the same documents from any row on, and broken ones say where."""

from __future__ import annotations

import gzip
import io
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from simvq_moe.data.documents import (
    CorruptDataError,
    Defect,
    Defects,
    OnCorrupt,
    Rows,
    first_defect,
    read_rows,
)
from simvq_moe.data.text import token_windows
from simvq_moe.merging import ConfigError

TEXTS = [f"document {i} " + "word " * (i % 7) * 20 for i in range(60)]


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts).encode()


def write_jsonl(path: Path) -> Path:
    path = path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS))
    return path


def write_gzip(path: Path) -> Path:
    path = path / "a.json.gz"
    path.write_bytes(gzip.compress(json_lines(TEXTS), mtime=0))
    return path


def write_parquet(path: Path) -> Path:
    path = path / "a.parquet"
    table = pa.table({"other": [0] * len(TEXTS), "text": TEXTS})
    parquet.write_table(table, path, row_group_size=25)
    return path


def write_tar(path: Path) -> Path:
    path = path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for i, text in enumerate(TEXTS):
            plain = i % 2 == 0
            member = tarfile.TarInfo(f"{i:03}.{'txt' if plain else 'json'}")
            content = text.encode() if plain else json.dumps({"text": text}).encode()
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


Write = Callable[[Path], Path]
of_every_kind = pytest.mark.parametrize(
    "write", [write_jsonl, write_gzip, write_parquet, write_tar], ids=lambda w: w.__name__
)


@of_every_kind
@pytest.mark.parametrize("rows", [Rows(), Rows(31), Rows(0, 1, 3), Rows(26, 2, 3)])
def test_rows_are_read_from_any_one_on_and_in_parts(
    write: Write, rows: Rows, tmp_path: Path
) -> None:
    expected = [(i, text) for i, text in enumerate(TEXTS) if i >= rows.first]
    expected = [(i, text) for i, text in expected if i % rows.parts == rows.part]
    assert list(read_rows(write(tmp_path), rows)) == expected


def damage(path: Path) -> None:
    """Cut a file in the middle of its content."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


@of_every_kind
def test_a_file_that_was_cut_says_where_and_gives_what_is_before(
    write: Write, tmp_path: Path
) -> None:
    path = write(tmp_path)
    damage(path)
    found = list(read_rows(path, Rows()))
    assert isinstance(found[-1][1], Defect)
    assert str(found[-1][1]).startswith(f"{path} ")
    texts = [text for _, text in found[:-1]]
    assert texts == TEXTS[: len(texts)]
    # of parquet the end is what is needed first
    assert (len(texts) > 0) == (path.suffix != ".parquet")


def test_a_parquet_file_with_a_broken_page_gives_the_row_groups_before(tmp_path: Path) -> None:
    path = write_parquet(tmp_path)
    content = bytearray(path.read_bytes())
    start = parquet.ParquetFile(path).metadata.row_group(1).column(1).dictionary_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    found = list(read_rows(path, Rows()))
    assert [text for _, text in found[:-1]] == TEXTS[:25]
    assert str(found[-1][1]).startswith(f"{path} from row 25 on: ")


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b'{"text": bad', "Expecting value"), (b'{"text": "\xff"}', "utf-8"), (b"[1]", "no field")],
)
def test_after_a_broken_line_the_next_one_is_read(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS[:2]) + line + b"\n\n" + json_lines(TEXTS[2:4]))
    (first, second, (_, defect), *rest) = read_rows(path, Rows())
    assert [first[1], second[1], *(text for _, text in rest)] == TEXTS[:4]
    assert str(defect).startswith(f"{path} line 3: ")
    assert reason in str(defect)


def test_a_file_without_texts_is_of_another_kind_and_not_broken(tmp_path: Path) -> None:
    contents = {
        "a.jsonl": b'{"body": 1}\n',
        "b.jsonl": b'{"text": ""}\n',
        "c.txt": b"\xff",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        defect = first_defect(tmp_path / name)
        assert defect is not None
        assert defect.of_another_kind
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "d.parquet")
    assert (first_defect(tmp_path / "d.parquet") or Defect("", "")).of_another_kind
    assert first_defect(write_tar(tmp_path)) is None


def test_defects_stop_or_are_named_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    defects, other = Defect("a.jsonl line 3", "bad"), Defect("b.tar from member 1 on", "cut")
    with pytest.raises(
        CorruptDataError, match=r"a\.jsonl line 3: bad: .* data\.on_corrupt to skip"
    ):
        Defects("stop").meet(defects)
    skipping = Defects("skip")
    with caplog.at_level(logging.WARNING):
        for defect in (defects, other, defects):
            skipping.meet(defect)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "skipped a.jsonl line 3: bad (1 skipped by this process)",
        "skipped b.tar from member 1 on: cut (2 skipped by this process)",
    ]


@of_every_kind
@pytest.mark.parametrize("on_corrupt", ["stop", "skip"])
def test_a_corpus_with_a_cut_file_stops_with_its_name_or_does_without(
    write: Write, on_corrupt: OnCorrupt, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    damage(write(source))
    (source / "whole.jsonl").write_bytes(json_lines([f"another {text}" for text in TEXTS]))
    broken = next(path for path in source.iterdir() if path.name != "whole.jsonl")
    settings = {"vocabulary": 257, "context": 8, "cache_dir": str(tmp_path / "cache")}
    if on_corrupt == "stop":
        with pytest.raises(ConfigError, match=rf"data\.source .*source' can't be read: {broken} "):
            token_windows(str(source), on_corrupt="stop", **settings)
        assert not (tmp_path / "cache").exists()
        return
    with caplog.at_level(logging.WARNING):
        corpus = token_windows(str(source), on_corrupt="skip", **settings)
    assert any(f"skipped {broken} " in record.getMessage() for record in caplog.records)
    assert len(corpus.held_out) > 0
