"""Data sets that `datasets` has saved to disk as sources of text, and a text's field and splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from simvq_moe.config.checks import check
from simvq_moe.config.schema import Config, DataConfig
from simvq_moe.data.rows.base import Rows
from simvq_moe.data.rows.saved_sets import own_splits, shards
from simvq_moe.data.text.corpora import check_source, token_windows
from simvq_moe.data.text.documents import list_files, read_rows
from simvq_moe.data.text.streaming import TextStream, text_stream
from simvq_moe.data.text.tokens import Corpus, TokenWindows
from simvq_moe.errors import ConfigError

TEXTS = [f"document {i} " + "word " * (i % 7) * 20 for i in range(60)]


@pytest.fixture(autouse=True)
def no_bars() -> None:
    datasets.disable_progress_bars()


def saved(folder: Path, texts: list[str], field: str = "text", **options: Any) -> Path:
    rows = datasets.Dataset.from_dict({"n": list(range(len(texts))), field: texts})
    rows.save_to_disk(folder, **options)
    return folder


def corpus_of(source: Path, cache: Path, **options: Any) -> Corpus:
    return token_windows(str(source), vocabulary=257, context=8, cache_dir=str(cache), **options)


def documents(part: Any, corpus: Corpus) -> list[str]:
    assert isinstance(part, TokenWindows)
    ends = np.flatnonzero(part.tokens == corpus.end_of_text)
    starts = [0, *(ends[:-1] + 1)]
    return [corpus.decode(part.tokens[a:b]) for a, b in zip(starts, ends, strict=True)]


def test_its_rows_are_those_that_datasets_reads_from_any_row_on(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", TEXTS, num_shards=3)
    files = list_files(str(folder))
    assert [file.name for file in files] == [f"data-0000{i}-of-00003.arrow" for i in range(3)]
    found = [text for file in files for _, text in read_rows(file.path, Rows())]
    expected = datasets.load_from_disk(folder)
    assert found == list(expected["text"]) == TEXTS
    assert [row for row, _ in read_rows(files[1].path, Rows(first=15, part=1, parts=2))] == [
        15,
        17,
        19,
    ]


def test_a_split_is_cut_by_content_and_splits_stay_as_they_are(tmp_path: Path) -> None:
    alone = corpus_of(saved(tmp_path / "one", TEXTS), tmp_path / "cache")
    both = documents(alone.train, alone) + documents(alone.held_out, alone)
    assert sorted(both) == sorted(TEXTS)
    parts = {"test": TEXTS[50:], "train": TEXTS[:45], "validation": TEXTS[40:50]}
    rows: Any = {name: datasets.Dataset.from_dict({"text": t}) for name, t in parts.items()}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "set")
    check_source(str(tmp_path / "set"))
    corpus = corpus_of(tmp_path / "set", tmp_path / "cache")
    assert documents(corpus.held_out, corpus) == TEXTS[40:50]
    assert documents(corpus.train, corpus) == TEXTS[:40], "copies of held-out ones are left out"
    named = corpus_of(
        tmp_path / "set", tmp_path / "cache", held_out_source=str(tmp_path / "set" / "test")
    )
    assert documents(named.held_out, named) == TEXTS[50:]
    assert named.digest != corpus.digest


def test_a_held_out_source_may_be_any_text(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / ("train" if i < 50 else "val") / f"{i:02}.txt").write_text(text)
    (tmp_path / "val" / "copy.txt").write_text(TEXTS[0])
    held_out = str(tmp_path / "val")
    corpus = corpus_of(tmp_path / "train", tmp_path / "cache", held_out_source=held_out)
    assert sorted(documents(corpus.train, corpus)) == sorted(TEXTS[1:50])
    assert sorted(documents(corpus.held_out, corpus)) == sorted([TEXTS[0], *TEXTS[50:]])
    with pytest.raises(ConfigError, match=r"data\.held_out_source .* holds every document of it"):
        corpus_of(tmp_path / "train", tmp_path / "cache", held_out_source=str(tmp_path))


def test_a_named_field_is_read_and_is_part_of_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = [{"text": f"no {i}", "body": text} for i, text in enumerate(TEXTS)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    datasets.Dataset.from_list(lines).to_parquet(folder / "b.parquet")
    body = corpus_of(folder, tmp_path / "cache", text_field="body")
    both = documents(body.train, body) + documents(body.held_out, body)
    assert sorted(both) == sorted(TEXTS * 2)
    other = corpus_of(folder, tmp_path / "cache")
    assert other.digest != body.digest
    assert "no 3" in documents(other.train, other) + documents(other.held_out, other)
    stream = stream_of(folder, tmp_path / "cache", text_field="body")
    cursor = stream.sources[0].cursor(0, 1, (0,), None)
    assert {found[-1] for found in cursor} == set(TEXTS)


def stream_of(source: Path, cache: Path, **options: Any) -> TextStream:
    return text_stream(
        [str(source)],
        weights=(),
        held_out_share=0.2,
        held_out_documents=3,
        shuffle_buffer=4,
        seed=0,
        vocabulary=257,
        context=8,
        cache_dir=str(cache),
        tokenizer=None,
        on_corrupt="stop",
        **options,
    )[0]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_a_field_that_is_not_there_is_refused_with_those_that_are(
    kind: str, tmp_path: Path
) -> None:
    rows = datasets.Dataset.from_list([{"id": i, "body": text} for i, text in enumerate(TEXTS)])
    source = tmp_path / "rows"
    source.mkdir()
    if kind == "jsonl":
        (source / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    elif kind == "parquet":
        rows.to_parquet(source / "a.parquet")
    else:
        rows.save_to_disk(source)
    words = "'title' among id, body: name one as data.text_field"
    with pytest.raises(ConfigError, match=words):
        check_source(str(source), text_field="title")
    with pytest.raises(ConfigError, match=words):
        corpus_of(source, tmp_path / "cache", text_field="title")
    with pytest.raises(ConfigError, match=words):
        stream_of(source, tmp_path / "cache", text_field="title")
    assert not (tmp_path / "cache").exists()


def write_state(folder: Path, content: Any) -> None:
    (folder / "state.json").write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("{", "state.json"),
        ({}, "_data_files"),
        ({"_data_files": []}, "_data_files"),
        ({"_data_files": [{"filename": "../secret.arrow"}]}, "must be the name of a file"),
        ({"_data_files": [{"filename": "/etc/passwd"}]}, "must be the name of a file"),
        ({"_data_files": [{"filename": "link.arrow"}]}, "names link.arrow, which is no file in it"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "names gone.arrow, which is no file in it"),
    ],
)
def test_a_stranger_s_list_of_files_leads_nowhere_else(
    state: Any, words: str, tmp_path: Path
) -> None:
    (tmp_path / "secret.arrow").write_bytes(b"secret")
    folder = saved(tmp_path / "set", TEXTS)
    (folder / "link.arrow").symlink_to(tmp_path / "secret.arrow")
    write_state(folder, state)
    with pytest.raises(ConfigError) as error:
        list_files(str(folder))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
def test_a_broken_file_is_named_in_a_line(keep: float, tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", TEXTS)
    (shard,) = shards(folder)
    shard.write_bytes(shard.read_bytes()[: int(keep * shard.stat().st_size)])
    with pytest.raises(ConfigError) as error:
        corpus_of(folder, tmp_path / "cache")
    assert str(shard) in str(error.value)
    assert "\n" not in str(error.value)


def test_splits_without_one_to_train_on_are_listed(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"en": rows, "de": rows}).save_to_disk(tmp_path / "set")
    with pytest.raises(ConfigError, match="has no split 'train' among en, de: name the folder"):
        own_splits(str(tmp_path / "set"), None)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["../../x"]}')
    with pytest.raises(ConfigError, match="must be the name of a file or folder in it"):
        own_splits(str(tmp_path / "set"), None)
    assert own_splits(str(tmp_path), "x") == (str(tmp_path), "x")


def test_held_out_sources_of_streams_and_fields_of_images_are_refused() -> None:
    streamed = DataConfig(held_out_source="x", streaming=True)
    with pytest.raises(ConfigError, match=r"data\.held_out_source 'x' with data\.streaming True"):
        check(Config(task="language_model", data=streamed))
    with pytest.raises(ConfigError, match=r"data\.text_field 'body' with task 'image_tokenizer'"):
        check(Config(data=DataConfig(text_field="body")))
