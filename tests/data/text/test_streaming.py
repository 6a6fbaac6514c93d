"""Streams: the same global batches on any ranks, from any position, of every training document."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import IterableDataset
from pyarrow import parquet

from simvq_moe.data.order import Share, place_of
from simvq_moe.data.rows.base import CorruptDataError, Rows
from simvq_moe.data.text.documents import content_name
from simvq_moe.data.text.sources import HubCursor, HubDataset, LocalFiles, check_stream
from simvq_moe.data.text.streaming import TextStream, text_stream
from simvq_moe.data.text.tokens import Corpus
from simvq_moe.errors import ConfigError

LANES = 4
STEPS = 170
"""Enough for more than two epochs."""


def text_of(i: int, source: str = "") -> str:
    return f"{source}{i}:" + "word " * (i * 7 % 11)


def write_rows(folder: Path, files: int, documents: int = 400, source: str = "") -> Path:
    """Documents in files of alternating kinds."""
    folder.mkdir(parents=True)
    texts = [text_of(i, source) for i in range(documents)]
    for i in range(files):
        part = texts[i::files]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
        if i % 3 == 0:
            (folder / f"{i}.jsonl").write_bytes(lines)
        elif i % 3 == 1:
            (folder / f"{i}.json.gz").write_bytes(gzip.compress(lines))
        else:
            parquet.write_table(pa.table({"text": part}), folder / f"{i}.parquet", row_group_size=9)
    return folder


def stream(*sources: Path, cache: Path, **change: Any) -> tuple[TextStream, Corpus]:
    settings: dict[str, Any] = {
        "weights": (),
        "held_out_share": 0.1,
        "held_out_documents": 20,
        "shuffle_buffer": 8,
        "seed": 0,
        "vocabulary": 257,
        "context": 48,
        "cache_dir": str(cache),
        "tokenizer": None,
        "on_corrupt": "stop",
    }
    return text_stream([str(source) for source in sources], **settings | change)


def documents(tokens: np.ndarray, corpus: Corpus) -> list[str]:
    """Texts of whole documents in a row of tokens."""
    ends = np.flatnonzero(tokens == corpus.end_of_text)
    return [corpus.decode(part[:-1]) for part in np.split(tokens, ends + 1)[:-1]]


def read(text: TextStream, steps: int, share: Share, position: Any = None) -> list[Any]:
    return list(itertools.islice(text.batches(share, position or {}), steps))


def lane_tokens(text: TextStream, steps: int) -> list[np.ndarray]:
    """What each lane reads, in a row."""
    found = read(text, steps, Share(LANES, 1, 0, 1))
    windows = np.stack([step.micro_batches[0].numpy() for step in found], axis=1)
    return [np.concatenate([lane[0, :1], lane[:, 1:].flatten()]) for lane in windows]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("stream") / "rows", 6)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("files", [1, 3, 6], ids=["one file", "fewer than lanes", "more"])
def test_an_epoch_of_all_lanes_is_every_training_document_once(files: int, tmp_path: Path) -> None:
    text, corpus = stream(write_rows(tmp_path / "rows", files), cache=tmp_path / "cache")
    held_out = {text for text in map(text_of, range(400)) if is_held_out(text)}
    seen: Counter[str] = Counter()
    for lane in lane_tokens(text, STEPS):
        found = documents(lane, corpus)
        epoch = len(set(found))
        assert len(found) > 2 * epoch
        assert sorted(found[:epoch]) == sorted(found[epoch : 2 * epoch]) == sorted(set(found))
        assert found[:epoch] != found[epoch : 2 * epoch] != sorted(found[:epoch])
        seen.update(found[:epoch])
    assert set(seen) == set(map(text_of, range(400))) - held_out
    assert set(seen.values()) == {1}


def is_held_out(text: str) -> bool:
    return place_of(content_name(text)) < 0.1


def test_the_held_out_set_is_the_first_documents_of_the_held_out_share(
    source: Path, cache: Path
) -> None:
    _, corpus = stream(source, cache=cache)
    found = documents(corpus.held_out.tokens, corpus)
    assert len(found) == len(set(found)) == 20
    assert all(map(is_held_out, found))
    _, all_of_them = stream(source, cache=cache, held_out_documents=1_000)
    expected = {text for text in map(text_of, range(400)) if is_held_out(text)}
    assert set(documents(all_of_them.held_out.tokens, all_of_them)) == expected
    assert corpus.digest != all_of_them.digest


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("files", [2, 6])
def test_ranks_together_read_the_batches_of_one_rank_and_each_only_its_own_lanes(
    files: int, accumulation: int, tmp_path: Path
) -> None:
    text, _ = stream(write_rows(tmp_path / "rows", files), cache=tmp_path / "cache")
    alone = read(text, 20, Share(LANES, accumulation, 0, 1))
    ranks = [read(text, 20, Share(LANES, accumulation, rank, 2)) for rank in range(2)]
    for step, first, second in zip(alone, *ranks, strict=True):
        for i, micro_batch in enumerate(step.micro_batches):
            parts = [first.micro_batches[i], second.micro_batches[i]]
            assert torch.equal(torch.cat(parts), micro_batch)
        assert not first.position.keys() & second.position.keys()
        assert first.position.keys() | second.position.keys() == step.position.keys()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stop", [1, 13, 50])
def test_reading_goes_on_from_a_saved_position_on_any_number_of_ranks(
    stop: int, ranks: int, source: Path, cache: Path, tmp_path: Path
) -> None:
    text, _ = stream(source, cache=cache)
    undisturbed = read(text, 70, Share(LANES, 1, 0, 1))
    torch.save(undisturbed[stop - 1].position, tmp_path / "position.pt")
    position = torch.load(tmp_path / "position.pt", weights_only=True)
    parts = [read(text, 70 - stop, Share(LANES, 1, rank, ranks), position) for rank in range(ranks)]
    for expected, *found in zip(undisturbed[stop:], *parts, strict=True):
        batch = torch.cat([part.micro_batches[0] for part in found])
        assert torch.equal(batch, expected.micro_batches[0])


def test_windows_overlap_by_a_token_and_seeds_have_orders_of_their_own(
    source: Path, cache: Path
) -> None:
    text, _ = stream(source, cache=cache)
    first, second = read(text, 2, Share(LANES, 1, 0, 1))
    assert torch.equal(first.micro_batches[0][:, -1], second.micro_batches[0][:, 0])
    other, _ = stream(source, cache=cache, seed=1)
    assert other.tokenizer == text.tokenizer
    (changed,) = read(other, 1, Share(LANES, 1, 0, 1))
    assert not torch.equal(changed.micro_batches[0], first.micro_batches[0])


def test_sources_are_drawn_by_weight_and_reading_goes_on_in_the_same_mixture(
    tmp_path: Path,
) -> None:
    sources = [write_rows(tmp_path / name, 2, 300, name) for name in ("red", "blue")]
    text, corpus = stream(*sources, cache=tmp_path / "cache", weights=(3.0, 1.0))
    drawn = Counter(
        "red" if document.startswith("red") else "blue"
        for lane in lane_tokens(text, STEPS)
        for document in documents(lane, corpus)
    )
    total = sum(drawn.values())
    # five standard deviations of as many independent draws
    assert abs(drawn["red"] / total - 0.75) < 5 * (0.75 * 0.25 / total) ** 0.5
    domains = corpus.held_out.domains
    assert domains is not None
    assert domains.names == ("blue", "red")
    assert Counter(domains.of_document.tolist()) == {1: 15, 0: 5}
    undisturbed = read(text, 30, Share(LANES, 1, 0, 1))
    resumed = read(text, 10, Share(LANES, 1, 0, 1), undisturbed[19].position)
    for expected, found in zip(undisturbed[20:], resumed, strict=True):
        assert torch.equal(found.micro_batches[0], expected.micro_batches[0])


def test_a_tokenizer_is_trained_on_training_documents_of_the_beginning(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows", 3)
    _, corpus = stream(source, cache=tmp_path / "cache", vocabulary=270)
    assert corpus.bytes_of_token.shape == (270,)
    assert int(corpus.bytes_of_token.max()) > 1


def test_the_cache_is_made_once_and_holds_whole_folders_only(source: Path, tmp_path: Path) -> None:
    found = [stream(source, cache=tmp_path)[1].tokenizer.parent for _ in range(2)]
    assert found[0] == found[1]
    assert [path.name for path in tmp_path.iterdir()] == [found[0].name]


def test_a_broken_file_stops_its_lane_with_its_name_or_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_rows(tmp_path / "rows", 6)
    text, _ = stream(source, cache=tmp_path)
    broken = source / "3.jsonl"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2].ljust(len(content), b"x"))
    with pytest.raises(CorruptDataError, match=rf"{broken} line \d+: .*data\.on_corrupt to skip"):
        read(text, STEPS, Share(LANES, 1, 0, 1))
    # lanes of rank 0 have other files
    assert len(read(text, STEPS, Share(LANES, 1, 0, 2))) == STEPS
    text, _ = stream(source, cache=tmp_path, on_corrupt="skip")
    with caplog.at_level(logging.WARNING):
        assert len(read(text, STEPS, Share(LANES, 1, 0, 1))) == STEPS
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"skipped {broken} line ")
    assert line.endswith("(1 skipped by this process)")


@pytest.mark.parametrize(
    ("documents", "change", "message"),
    [
        (400, {"held_out_share": 1e-9}, r"data\.held_out_share 1e-09: none of the 400 documents"),
        (400, {"vocabulary": 60_000}, r"data\.vocabulary 60000 > \d+, the most"),
    ],
)
def test_what_a_source_can_not_give_is_named(
    documents: int, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "rows", 2, documents)
    with pytest.raises(ConfigError, match=message):
        stream(source, cache=tmp_path / "cache", **change)
    assert not (tmp_path / "cache").exists()


def test_a_lane_without_a_document_is_named(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows", 1, 30)
    text, _ = stream(source, cache=tmp_path / "cache")
    with pytest.raises(
        CorruptDataError, match=r"no training document for sample .* of a batch of 64"
    ):
        read(text, 1, Share(64, 1, 0, 1))


@pytest.mark.parametrize("source", ["./missing", "missing/folder/with/parts", "a b"])
def test_a_source_that_is_neither_path_nor_name_is_named(source: str) -> None:
    with pytest.raises(ConfigError, match="does not exist: give a folder"):
        check_stream(source)


def hub_dataset(source: Path) -> HubDataset:
    """What `datasets` makes of a name on the hub, of local files."""
    found = HubDataset.__new__(HubDataset)
    found.name = found.digest = "owner/name"
    files: list[Any] = sorted(map(str, source.glob("*.parquet")))
    loaded = IterableDataset.from_parquet(files, cache_dir=str(source / "scratch"))
    found.dataset = loaded.select_columns(["text"])
    return found


def test_a_data_set_of_the_hub_has_the_documents_of_its_files_in_lanes_and_from_any_position(
    tmp_path: Path,
) -> None:
    source = tmp_path / "rows"
    source.mkdir()
    texts = [text_of(i) for i in range(90)]
    for i in range(3):
        table = pa.table({"text": texts[i::3]})
        parquet.write_table(table, source / f"{i}.parquet", row_group_size=10)
    hub = hub_dataset(source)
    assert hub.dataset.num_shards == 3
    for lanes in (2, 3, 7):
        parts = [list(hub.cursor(lane, lanes, (0,), None)) for lane in range(lanes)]
        assert sorted(found[-1] for part in parts for found in part) == sorted(texts)
        local = [list(LocalFiles(str(source)).cursor(j, lanes, (0,), None)) for j in range(lanes)]
        assert sorted(map(len, parts)) == sorted(map(len, local))
    cursor = hub.cursor(0, 7, (0,), None)
    given = list(itertools.islice(cursor, 4))
    again = hub.cursor(0, 7, (0,), json.loads(json.dumps(cursor.position)))
    assert isinstance(again, HubCursor)
    assert again.rows == Rows(0, 0, 3)
    assert [*given, *again] == list(hub.cursor(0, 7, (0,), None))


def broken_positions(position: dict[int, Any]) -> dict[str, Any]:
    """Positions of lane 0 that no stream of one source can have given."""
    lane = position[0]
    source = lane["sources"][0]

    def of(**change: Any) -> dict[str, Any]:
        return lane | {"sources": [source | change]}

    return {
        "no lane": [],
        "nothing in it": {},
        "no tokens": lane | {"left": None},
        "tokens of another type": lane | {"left": torch.zeros(3)},
        "tokens in a table": lane | {"left": torch.zeros(3, 3, dtype=torch.int32)},
        "negative tokens": lane | {"left": torch.full((3,), -1, dtype=torch.int32)},
        "negative draws": lane | {"drawn": -1},
        "draws in quotes": lane | {"drawn": "3"},
        "huge draws": lane | {"drawn": 10**30},
        "two sources": lane | {"sources": [source, source]},
        "no source": lane | {"sources": []},
        "source of another type": lane | {"sources": [3]},
        "negative epoch": of(epoch=-1),
        "fraction of a block": of(number=0.5),
        "more taken than there is": of(taken=10**6),
        "a file beyond": of(position=[99, 0]),
        "a negative row": of(position=[0, -1]),
        "another position": of(position={"row": 0}),
    }


def test_a_position_of_other_sources_is_named_and_not_read_from(source: Path, cache: Path) -> None:
    text, _ = stream(source, cache=cache)
    (step,) = read(text, 1, Share(1, 1, 0, 1))
    for broken in broken_positions(step.position).values():
        with pytest.raises(CorruptDataError, match="position"):
            read(text, 1, Share(1, 1, 0, 1), {0: broken})
    again = read(text, 1, Share(1, 1, 0, 1), step.position)
    assert torch.equal(again[0].micro_batches[0][:, 0], step.micro_batches[0][:, -1])


def test_a_copy_of_a_held_out_text_is_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(80):
        (tmp_path / "texts" / f"{i}.txt").write_text(text_of(i % 40))
    text, corpus = stream(tmp_path / "texts", cache=tmp_path / "cache", held_out_documents=999)
    held_out = set(documents(corpus.held_out.tokens, corpus))
    assert held_out == {text_of(i) for i in range(40) if is_held_out(text_of(i))}
    trained = {found for lane in lane_tokens(text, 60) for found in documents(lane, corpus)}
    assert trained == set(map(text_of, range(40))) - held_out


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, "has no column 'text' among body"),
        ({"text": ["a"]}, None),
    ],
)
def test_a_data_set_of_the_hub_without_texts_is_named_when_it_is_opened(
    columns: dict[str, list[str]],
    message: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    files: list[Any] = [str(tmp_path / "a.parquet")]
    loaded = IterableDataset.from_parquet(files, cache_dir=str(tmp_path / "scratch"))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: loaded)
    if message is None:
        assert [found[-1] for found in HubDataset("owner/name").cursor(0, 1, (0,), None)] == ["a"]
        return
    with pytest.raises(ConfigError, match=message):
        HubDataset("owner/name")


def test_rows_of_the_hub_without_a_string_are_defects_and_bytes_are_texts(tmp_path: Path) -> None:
    source = tmp_path / "rows"
    source.mkdir()
    parquet.write_table(pa.table({"text": [3, None, 4]}), source / "a.parquet")
    found = list(hub_dataset(source).cursor(0, 1, (0,), None))
    assert [str(one) for one in found] == [
        f"data.source 'owner/name' row {row} of a lane: 'text' is a int, no string"
        for row in (0, 2)
    ]
    parquet.write_table(pa.table({"text": [b"good", b"", b"\xff"]}), source / "a.parquet")
    good, bad = hub_dataset(source).cursor(0, 1, (0,), None)
    assert good[-1] == "good"
    assert "can't decode byte 0xff" in str(bad)
    with pytest.raises(CorruptDataError, match=r"is none of data\.source 'owner/name'"):
        hub_dataset(source).cursor(0, 1, (0,), {"row": 0, "shards": 3})
