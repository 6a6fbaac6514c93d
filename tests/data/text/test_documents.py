"""Files of every kind give the same documents from any row on, and broken ones say where."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow as pa
import pytest
from hypothesis import strategies as st
from pyarrow import parquet

from simvq_moe.data.rows import base
from simvq_moe.data.rows.base import CorruptDataError, Defect, Rows, UnreachableError
from simvq_moe.data.text.corpora import check_source, token_windows
from simvq_moe.data.text.documents import Defects, OnCorrupt, first_defect, list_files, read_rows
from simvq_moe.data.text.tokens import TokenWindows
from simvq_moe.errors import ConfigError

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
    for table in ({"body": ["x"]}, {"text": pa.nulls(3)}, {"text": pa.nulls(3, pa.string())}):
        parquet.write_table(pa.table(table), tmp_path / "d.parquet")
        assert (first_defect(tmp_path / "d.parquet") or Defect("", "")).of_another_kind
    assert first_defect(write_tar(tmp_path)) is None


def test_the_signature_of_a_utf8_file_is_no_text(tmp_path: Path) -> None:
    content = "\ufefföne\r\n".encode()
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "nothing.txt").write_bytes(content[:3])
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    for name in ("a.txt", "a.tar"):
        assert list(read_rows(tmp_path / name, Rows())) == [(0, "öne\r\n")]
    assert list(read_rows(tmp_path / "nothing.txt", Rows())) == []


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


def read(path: Path) -> list[str | Defect]:
    return [found for _, found in read_rows(path, Rows())]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"text": 5}', "'text' is a float, no string"),
        ('{"text": ["a"]}', "'text' is a list, no string"),
        ('{"text": "\\ud800"}', "surrogates not allowed"),
        ('{"n": 1}', "no field 'text'"),
    ],
)
def test_a_row_without_a_text_is_a_defect_of_that_row_alone(
    line: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS[:2]) + line.encode() + b"\n" + json_lines(TEXTS[2:4]))
    first, second, defect, *rest = read(path)
    assert [first, second, *rest] == TEXTS[:4]
    assert isinstance(defect, Defect)
    assert str(defect).startswith(f"{path} line 3: ")
    assert reason in str(defect)


@pytest.mark.parametrize("number", ["9" * 5_000, "-" + "9" * 5_000, "1e999", "NaN", "-0.0"])
def test_numbers_of_any_size_beside_a_text_are_of_no_matter(number: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a", "n": {number}}}\n{{"text": null}}\n{{"text": ""}}\n')
    assert read(path) == ["a"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_above_the_limit_is_named_and_the_next_one_read(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "LARGEST_ROW", 2_000)
    path = tmp_path / f"a{suffix}"
    content = json_lines(["a", "x" * 9_000, "b", "y" * 1_900])
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    first, defect, *rest = read(path)
    assert [first, *rest] == ["a", "b", "y" * 1_900]
    assert str(defect) == f"{path} line 2: more than 2,000 bytes"
    assert [row for row, _ in read_rows(path, Rows(2))] == [2, 3]


def traced(read_all: Callable[[], Any]) -> int:
    """Bytes that are held at most at once."""
    import tracemalloc

    tracemalloc.start()
    try:
        read_all()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_bounded_whatever_a_file_unpacks_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "LARGEST_ROW", 100_000)
    line = tmp_path / "a.jsonl.gz"
    with gzip.open(line, "wb") as file:
        for _ in range(20):
            file.write(b"[" * 10**6)
    member, attributes = tmp_path / "a.tar.gz", tmp_path / "b.tar.gz"
    with tarfile.open(member, "w:gz") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = 20 * 10**6
        archive.addfile(info, io.BytesIO(b"a" * info.size))
        small = tarfile.TarInfo("b.txt")
        small.size = 1
        archive.addfile(small, io.BytesIO(b"b"))
    with tarfile.open(attributes, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = {"comment": "a" * 20 * 10**6}
        archive.addfile(info)
    found: dict[Path, list[str | Defect]] = {}
    for path in (line, member, attributes):
        assert traced(lambda path=path: found.update({path: read(path)})) < 5e6
    assert [str(found[line][0])] == [f"{line} line 1: more than 100,000 bytes"]
    assert str(found[member][0]) == f"{member} member a.txt: more than 100,000 bytes"
    assert found[member][1:] == ["b"]
    assert "a header that says 20,000," in str(found[attributes][0])


def test_a_text_that_a_parquet_file_repeats_is_held_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pa.table({"text": pa.array(["x" * 10**6] * 300).dictionary_encode()}),
        *(path,),
        store_schema=False,
    )
    assert path.stat().st_size < 10**6
    pool = pa.default_memory_pool()
    before = pool.max_memory()
    assert sum(len(text) for text in read(path) if isinstance(text, str)) == 300 * 10**6
    assert pool.max_memory() - before < 50e6
    monkeypatch.setattr(base, "LARGEST_ROW", 1_000)
    assert str(read(path)[-1]) == f"{path} row 299: more than 1,000 bytes"


@pytest.mark.parametrize(
    "column",
    [
        pa.array([text.encode() for text in TEXTS], pa.binary()),
        pa.array([text.encode() for text in TEXTS], pa.large_binary()),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS, pa.string_view()),
        pa.array([text.encode() for text in TEXTS], pa.binary_view()),
    ],
    ids=["bytes", "large bytes", "large strings", "dictionary", "views", "views of bytes"],
)
def test_texts_of_columns_are_read_from_every_type_of_string(
    column: pa.Array, tmp_path: Path
) -> None:
    path, table = tmp_path / "a.parquet", pa.table({"text": column})
    parquet.write_table(table, path, row_group_size=25)
    assert read(path) == TEXTS
    arrow = tmp_path / "a.arrow"
    with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, table.schema) as batches:
        batches.write_table(table, 25)
    assert read(arrow) == TEXTS


@pytest.mark.parametrize("type_", ["numbers", "lists", "structs", "dates"])
def test_a_column_of_another_type_is_a_defect_of_the_file(type_: str, tmp_path: Path) -> None:
    values: dict[str, list[Any]] = {
        "numbers": [1, 2],
        "lists": [["a"], ["b"]],
        "structs": [{"text": "a"}, {"text": "b"}],
        "dates": pa.array([1, 2], pa.timestamp("s")),
    }
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": values[type_]}), path)
    (defect,) = read(path)
    assert str(defect).startswith(f"{path}: column 'text' holds ")
    assert first_defect(path) == defect
    assert not defect.of_another_kind  # pyright: ignore[reportAttributeAccessIssue]


def test_a_string_that_is_no_utf8_is_a_defect_of_its_row(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"caf\xe9", b"good as well"])
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    first, defect, last = read(tmp_path / "a.parquet")
    assert (first, last) == ("good", "good as well")
    assert "a.parquet row 1: 'utf-8' codec can't decode byte 0xe9" in str(defect)


@pytest.mark.parametrize("on_corrupt", ["stop", "skip"])
def test_a_file_is_not_judged_by_its_first_rows(on_corrupt: OnCorrupt, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"about": "a header"}\n[]\n' + json_lines(TEXTS))
    check_source(str(path))
    settings = {"vocabulary": 257, "context": 8, "cache_dir": str(tmp_path / "cache")}
    if on_corrupt == "stop":
        with pytest.raises(
            ConfigError, match=r"a\.jsonl line 1: no field 'text' among about: repair it"
        ):
            token_windows(str(path), on_corrupt="stop", **settings)
        return
    corpus = token_windows(str(path), on_corrupt="skip", **settings)
    assert isinstance(corpus.train, TokenWindows)
    whole = corpus.decode(corpus.train.tokens) + corpus.decode(corpus.held_out.tokens)
    assert whole.count("document ") == len(TEXTS)


@of_every_kind
@pytest.mark.parametrize("number", [13, 5], ids=["EACCES", "EIO"])
def test_a_file_that_can_not_be_reached_is_no_corrupt_one_and_never_skipped(
    write: Write, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    broken = write(folder)
    (folder / "whole.jsonl").write_bytes(json_lines([f"another {text}" for text in TEXTS]))

    def fail(path: Any, *_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    for module, name in (("pyarrow.parquet.ParquetFile", "__init__"), ("gzip", "open")):
        monkeypatch.setattr(
            f"{module}.{name}", fail if name == "open" else lambda _, p, **__: fail(p)
        )
    monkeypatch.setattr("tarfile.open", fail)
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda p, *a, **k: fail(p) if p == broken else opened(p, *a, **k)
    )
    reason = os.strerror(number)
    with pytest.raises(UnreachableError, match=rf"a\.\S+ can't be read now \({reason}\): make it"):
        read(broken)
    with pytest.raises(ConfigError, match=rf"can't be read now \({reason}\)") as caught:
        token_windows(
            *(str(folder),),
            vocabulary=257,
            context=8,
            cache_dir=str(tmp_path / "cache"),
            on_corrupt="skip",
        )
    assert "corrupt" not in str(caught.value).replace("test_a_file", "")
    assert not (tmp_path / "cache").exists()


def test_links_to_files_are_read_and_links_to_folders_named_but_not_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, source = tmp_path / "store", tmp_path / "source"
    (store / "deep").mkdir(parents=True)
    (store / "deep" / "in.txt").write_text("x")
    (store / "out.txt").write_text("x")
    source.mkdir()
    (source / "own.txt").write_text("x")
    (source / "linked.txt").symlink_to(store / "out.txt")
    (source / "circle").symlink_to(source)
    (source / "elsewhere").symlink_to(store)
    with caplog.at_level(logging.WARNING):
        assert [file.name for file in list_files(str(source))] == ["linked.txt", "own.txt"]
    assert "did not follow 2 links to folders: circle, elsewhere" in caplog.text
    assert [file.name for file in list_files(str(source / "elsewhere"))] == [
        "deep/in.txt",
        "out.txt",
    ]


@pytest.mark.parametrize("target", ["missing", "itself"])
def test_a_link_that_leads_nowhere_is_an_error_and_not_left_out(
    target: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to(tmp_path / ("b.txt" if target == "itself" else "none"))
    with pytest.raises(ConfigError, match=r"b\.txt can't be read now \("):
        list_files(str(tmp_path))


def test_a_folder_that_can_not_be_listed_is_an_error_and_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("x")
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if str(path).endswith("in"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(ConfigError, match=r"in can't be read now \(Permission denied\)"):
        list_files(str(tmp_path))


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("x")
    assert [file.name for file in list_files(str(tmp_path))] == ["b.txt"]
    with pytest.raises(ConfigError, match="is no file or folder"):
        list_files(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("source", ["a\0b", "n" * 5_000, "no/such"])
def test_a_path_that_can_not_be_is_named(source: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.source "):
        list_files(source)


def test_names_that_are_no_utf8_are_read_and_shown_as_escapes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = os.fsencode(tmp_path / "source")
    os.mkdir(source)
    for i in range(25):
        with open(source + b"/caf\xe9_%d\x1b.txt" % i, "wb") as file:
            file.write(b"some words %d " % i * 9)
    with open(source + b"/bad\xe9.txt", "wb") as file:
        file.write(b"\xff")
    settings = {"vocabulary": 257, "context": 8, "cache_dir": str(tmp_path / "cache")}
    with caplog.at_level(logging.WARNING):
        token_windows(os.fsdecode(source), **settings)
    assert "skipped 1 files without UTF-8 text: bad\\udce9.txt" in caplog.text


MUTATED = {write.__name__: write for write in (write_jsonl, write_gzip, write_parquet, write_tar)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp("whole")) for name, write in MUTATED.items()}


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    kind=st.sampled_from(sorted(MUTATED)),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from(["cut", "drop", "insert", "flip"]), st.binary()),
        min_size=1,
        max_size=4,
    ),
)
def test_a_file_with_any_damage_gives_texts_and_defects_and_nothing_else(
    kind: str, edits: list[tuple[float, str, bytes]], whole: dict[str, Path]
) -> None:
    content = whole[kind].read_bytes()
    for share, edit, other in edits:
        place = int(share * len(content))
        before, after = content[:place], content[place:]
        content = {
            "cut": before,
            "drop": before + after[9:],
            "insert": before + other + after,
            "flip": before + bytes(byte ^ 0xFF for byte in after[:3]) + after[3:],
        }[edit]
    path = whole[kind].with_name(f"mutated{''.join(whole[kind].suffixes)}")
    path.write_bytes(content)
    found = read(path)
    assert all(isinstance(one, str | Defect) for one in found)
    assert first_defect(path) is None or isinstance(first_defect(path), Defect)
