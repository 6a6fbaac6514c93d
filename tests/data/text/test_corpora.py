"""Token files hold the corpus to the byte, in windows that miss no target."""

import errno
import fcntl
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from simvq_moe.data.held_out import SHARE, held_out_by_content
from simvq_moe.data.order import place_of
from simvq_moe.data.text import corpora, documents
from simvq_moe.data.text.cache import build_once
from simvq_moe.data.text.corpora import check_source, token_windows
from simvq_moe.errors import ConfigError
from simvq_moe.files.locks import alone

WORDS = ["shared", "map", "code", "expert", "idle", "naïve", "漢字", "🙂", "<|endoftext|>\t\r\n"]


def document(seed, words=200):
    rng = np.random.default_rng(seed)
    return f"{seed}: " + " ".join(rng.choice(WORDS, size=words))


def write_files(folder, count=40):
    (folder / "deep").mkdir(parents=True)
    for i in range(count):
        path = folder / ("deep" if i % 2 else ".") / f"{i:02}.txt"
        path.write_bytes(document(i).encode())
    return folder


def windows(source, cache, vocabulary=300, context=16) -> Any:
    return token_windows(str(source), vocabulary=vocabulary, context=context, cache_dir=str(cache))


def texts(part, corpus):
    """The documents of one side, decoded one by one."""
    ends = np.flatnonzero(part.tokens == 0)
    starts = [0, *(ends[:-1] + 1)]
    return [corpus.decode(part.tokens[a:b]) for a, b in zip(starts, ends, strict=True)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(source, cache):
    return windows(source, cache)


def test_every_document_is_on_one_side_to_the_byte(corpus):
    train, held_out = texts(corpus.train, corpus), texts(corpus.held_out, corpus)
    assert sorted(train + held_out) == sorted(document(i) for i in range(40))
    assert 1 <= len(held_out) <= 10


def test_bytes_of_tokens_add_up_to_the_corpus(corpus):
    for part in (corpus.train, corpus.held_out):
        ids = torch.from_numpy(part.tokens.astype(np.int64))
        size = sum(len(document.encode()) for document in texts(part, corpus))
        assert int(corpus.bytes_of_token[ids].sum()) == size


def test_the_vocabulary_is_exact_and_starts_with_the_end_of_text(corpus):
    content = json.loads(corpus.tokenizer.read_text(encoding="utf-8"))
    assert corpus.bytes_of_token.shape == (300,)
    assert content["model"]["vocab"]["<|endoftext|>"] == 0
    assert int(corpus.bytes_of_token[0]) == 0
    assert int(corpus.bytes_of_token[1:].min()) == 1
    assert sorted(content["model"]["vocab"].values()) == list(range(300))


def test_the_tokenizer_knows_training_documents_alone(tmp_path, source):
    held_out = [f for f, out in zip(*sides(source), strict=True) if out]
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    for name, other in zip(held_out, others_held_out(), strict=False):
        (changed / name).write_text(other)
    first, second = windows(source, tmp_path / "1"), windows(changed, tmp_path / "2")
    assert first.tokenizer.read_bytes() == second.tokenizer.read_bytes()
    np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
    assert len(first.held_out.tokens) != len(second.held_out.tokens)


def sides(source):
    files = documents.list_files(str(source))
    keys = [documents.content_name(file.path.read_bytes().decode()) for file in files]
    return [file.name for file in files], held_out_by_content(keys, SHARE)


def others_held_out():
    """Other texts whose content is held out."""
    for i in itertools.count():
        other = f"{i} entirely other words " * 50
        if place_of(documents.content_name(other)) < SHARE:
            yield other


def test_copies_under_other_names_are_on_one_side(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(60):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(document(i % 30, 20))
    (tmp_path / "texts" / "rows.jsonl").write_text(
        "".join(json.dumps({"text": document(i, 20)}) + "\n" for i in range(40))
    )
    corpus = windows(tmp_path / "texts", tmp_path / "cache")
    train, held_out = texts(corpus.train, corpus), texts(corpus.held_out, corpus)
    assert len(train) + len(held_out) == 100
    assert held_out
    assert not set(train) & set(held_out)


def test_token_files_are_mapped_and_small(corpus):
    assert isinstance(corpus.train.tokens, np.memmap)
    assert corpus.train.tokens.dtype == np.uint16


def test_an_equal_corpus_is_encoded_once(tmp_path, source, corpus, cache, monkeypatch):
    copy = tmp_path / "elsewhere"
    shutil.copytree(source, copy)
    monkeypatch.setattr(corpora, "write_corpus", lambda *_, **__: pytest.fail("encoded again"))
    again = windows(copy, cache, context=8)
    assert again.tokenizer == corpus.tokenizer
    assert again.train.batch(np.arange(2)).shape == (2, 9)


def test_the_cache_is_read_without_the_libraries_that_made_it(source, corpus, cache):
    assert corpus.tokenizer.parent.parent == cache
    program = (
        "import sys; from simvq_moe.data.text.corpora import token_windows\n"
        f"token_windows({str(source)!r}, vocabulary=300, context=16, cache_dir={str(cache)!r})\n"
        "print({'datasets', 'tokenizers', 'pyarrow'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "set()"


def test_a_changed_byte_or_setting_gives_another_cache(tmp_path, source, corpus):
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    with (changed / "00.txt").open("a") as file:
        file.write(".")
    cache = tmp_path / "cache"
    folders = {
        corpus.tokenizer.parent.name,
        windows(changed, cache).tokenizer.parent.name,
        windows(source, cache, vocabulary=301).tokenizer.parent.name,
    }
    assert len(folders) == 3


def test_the_cache_holds_whole_folders_only(corpus, cache):
    (folder,) = cache.iterdir()
    assert folder == corpus.tokenizer.parent
    assert sorted(path.name for path in folder.iterdir()) == [
        "held_out.npy",
        "held_out_domains.npz",
        "manifest.json",
        "tokenizer.json",
        "train.npy",
    ]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["train"]["tokens"] == len(corpus.train.tokens)
    assert manifest["train"]["documents"] + manifest["held_out"]["documents"] == 40


def test_a_process_that_comes_second_takes_the_folder_of_the_first(
    tmp_path, source, corpus, monkeypatch
):
    write = corpora.write_corpus

    def overtaken(*args, **kwargs):
        write(*args, **kwargs)
        folder = corpus.tokenizer.parent
        shutil.copytree(folder, tmp_path / "cache" / folder.name)

    monkeypatch.setattr(corpora, "write_corpus", overtaken)
    second = windows(source, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [second.tokenizer.parent.name]
    np.testing.assert_array_equal(second.train.tokens, corpus.train.tokens)


def test_an_interrupted_build_leaves_nothing_that_looks_finished(tmp_path, source, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpora, "write_corpus", interrupted)
    with pytest.raises(KeyboardInterrupt):
        windows(source, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_rows_of_json_lines_and_parquet_are_documents(tmp_path):
    source = tmp_path / "rows"
    source.mkdir()
    rows = [{"n": i, "text": document(i)} for i in range(15)]
    (source / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {"text": [*(document(i) for i in range(15, 30)), None, ""], "other": [0] * 17}
    parquet.write_table(pa.table(table), source / "b.parquet")
    (source / "c.md").write_bytes(document(30).encode())
    corpus = windows(source, tmp_path / "cache")
    documents = texts(corpus.train, corpus) + texts(corpus.held_out, corpus)
    assert sorted(documents) == sorted(document(i) for i in range(31))


def test_equal_rows_are_on_one_side(tmp_path):
    rows = [{"text": document(i % 25)} for i in range(100)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = windows(path, tmp_path / "cache")
    assert not set(texts(corpus.train, corpus)) & set(texts(corpus.held_out, corpus))


def test_of_few_documents_the_ends_are_held_out(tmp_path):
    path = tmp_path / "one.txt"
    whole = document(0, words=1_000)
    path.write_bytes(whole.encode())
    corpus = windows(path, tmp_path / "cache")
    (start,), (end,) = texts(corpus.train, corpus), texts(corpus.held_out, corpus)
    assert start + end == whole
    assert len(end) == pytest.approx(0.1 * len(whole), abs=1)


def test_the_standard_library_comes_without_tests_and_generated_tables():
    names = [file.name for file in documents.list_files("python-stdlib")]
    assert {"argparse.py", "asyncio/base_events.py", "json/decoder.py"} < set(names)
    assert names == sorted(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & documents.STDLIB_WITHOUT
    size = sum(file.path.stat().st_size for file in documents.list_files("python-stdlib"))
    assert 6e6 < size < 14e6


def test_undecodable_files_are_skipped_with_one_line_that_names_them(
    tmp_path, source, corpus, caplog
):
    mixed = tmp_path / "mixed"
    shutil.copytree(source, mixed)
    (mixed / "latin.txt").write_bytes(b"caf\xe9 " * 2_000)
    (mixed / "late.txt").write_bytes(b"good " * 2_000 + b"\xff")
    (mixed / "rows.jsonl").write_text('{"body": "no text"}\n')
    (mixed / "empty.txt").touch()
    (mixed / ".hidden.txt").write_text("hidden")
    (mixed / "photo.png").write_bytes(b"\x89PNG")
    with caplog.at_level(logging.WARNING):
        again = windows(mixed, tmp_path / "cache")
    (record,) = caplog.records
    expected = "skipped 3 files without UTF-8 text: late.txt, latin.txt, rows.jsonl"
    assert expected in record.getMessage()
    np.testing.assert_array_equal(again.train.tokens, corpus.train.tokens)


@pytest.mark.parametrize("make", [check_source, lambda s: windows(s, s + "-cache")])
@pytest.mark.parametrize("content", ["missing", "empty folder", "no text", "undecodable", "empty"])
def test_a_source_without_text_is_named_before_anything_is_written(tmp_path, make, content):
    source = tmp_path / "source"
    if content != "missing":
        source.mkdir()
    if content == "no text":
        (source / "photo.png").write_bytes(b"\x89PNG")
    if content == "undecodable":
        (source / "a.txt").write_bytes(b"\xff\xfe\xfd")
    if content == "empty":
        (source / "a.txt").touch()
    match = "does not exist" if content == "missing" else "holds no readable text"
    with pytest.raises(ConfigError, match=rf"data\.source .*source' {match}: give .*python-stdlib"):
        make(str(source))
    assert not (tmp_path / "source-cache").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocabulary": 256}, r"data\.vocabulary 256 < 257"),
        ({"vocabulary": 60_000}, r"data\.vocabulary 60000 > \d+, the most"),
    ],
)
def test_a_vocabulary_that_cannot_be_filled_is_named(tmp_path, source, settings, message):
    with pytest.raises(ConfigError, match=message):
        windows(source, tmp_path / "cache", **settings)
    assert not (tmp_path / "cache").exists()


def test_a_context_longer_than_the_corpus_is_named(source, cache):
    with pytest.raises(
        ConfigError, match=r"data\.context 100000: .* only \d+ train tokens in 1 files: lower it"
    ):
        windows(source, cache, context=100_000)


def test_damaged_rows_are_an_error_that_names_the_source(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": bad\n')
    with pytest.raises(ConfigError, match=r"data\.source .* can't be read: .*a\.jsonl line 2: "):
        windows(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_rows_without_any_text_are_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": ""}\n')
    with pytest.raises(ConfigError, match=r"data\.source .*a\.jsonl'"):
        windows(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_progress_bars_of_others_stay_as_they_were(tmp_path, source):
    import datasets

    before = datasets.are_progress_bars_disabled()
    windows(source, tmp_path / "cache")
    assert datasets.are_progress_bars_disabled() == before


def test_embedded_text_passes_the_check(source):
    check_source("python-stdlib")
    check_source(str(source))


def test_what_a_dead_process_was_building_goes_and_what_a_living_one_builds_stays(source, tmp_path):
    cache = tmp_path / "cache"
    dead, living = cache / "building-a", cache / "building-b"
    for folder in (dead, living):
        (folder / "built").mkdir(parents=True)
        (folder / "built" / "train.npy").write_bytes(b"half")
    with alone(living, "taken"):
        windows(source, cache)
    assert list(cache.glob("building-*")) == [living]


def test_two_processes_that_start_at_once_build_one_cache(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one has just made, and does not hold yet, is not left over to the other."""
    lock = fcntl.flock

    def late(*wanted: Any) -> None:
        time.sleep(0.002)
        lock(*wanted)

    monkeypatch.setattr(fcntl, "flock", late)
    context = multiprocessing.get_context("fork")
    barrier, failed = context.Barrier(2), context.Value("i", 0)

    def build_all() -> None:
        try:
            for i in range(50):
                barrier.wait(30)
                build_once(tmp_path / f"text-{i}", lambda built, _: (built / "a").touch(), "")
        except OSError:
            failed.value = 1
            barrier.abort()

    processes = [context.Process(target=build_all) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert not failed.value
    assert len(list(tmp_path.iterdir())) == 50


def test_a_full_disk_names_the_cache(tmp_path) -> None:
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28]")  # pyarrow's

    with pytest.raises(OSError, match="No space left on device") as found:
        build_once(tmp_path / "cache" / "text-1", fill, "")
    assert found.value.filename == str(tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


def test_a_file_system_without_locks_holds_a_cache(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"document {i} alpha beta gamma")
    young, old = tmp_path / "cache" / "building-a", tmp_path / "cache" / "building-b"
    for left in (young, old):
        left.mkdir(parents=True)
    os.utime(old, (0, 0))
    found: Any = token_windows(
        str(tmp_path / "texts"), vocabulary=257, context=8, cache_dir=str(tmp_path / "cache")
    )
    assert young.exists()
    assert not old.exists()
    assert found.decode(np.asarray(found.train.tokens)).count("alpha") > 20
