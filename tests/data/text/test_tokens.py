"""Windows miss no target, and token files of any number are one set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simvq_moe.data.rows.base import CorruptDataError
from simvq_moe.data.text.corpora import token_windows
from simvq_moe.data.text.tokens import Corpus, TokenShards, TokenWindows
from simvq_moe.errors import ConfigError


def windows(source: Path, cache: Path, vocabulary: int = 257, context: int = 16) -> Corpus:
    return token_windows(str(source), vocabulary=vocabulary, context=context, cache_dir=str(cache))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Thirty documents as bytes."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "texts").mkdir()
    for i in range(30):
        (folder / "texts" / f"{i}.txt").write_text(f"document {i} naïve 漢字 " * 20)
    return windows(folder / "texts", folder / "cache")


def test_windows_overlap_by_one_token_and_miss_no_target() -> None:
    part = TokenWindows(np.arange(32, dtype=np.uint16), context=5)
    assert len(part) == 6
    batch = part.batch(np.arange(6))
    assert batch.dtype == torch.int64
    assert batch[:, 1:].flatten().tolist() == list(range(1, 31))
    assert batch[:, :-1].flatten().tolist() == list(range(30))
    assert torch.equal(part.batch(torch.tensor([4, 1])), batch[[4, 1]])


@pytest.mark.parametrize(("tokens", "count"), [(0, 0), (5, 0), (6, 1), (10, 1), (11, 2)])
def test_a_window_needs_one_token_more_than_the_context(tokens: int, count: int) -> None:
    assert len(TokenWindows(np.zeros(tokens, dtype=np.uint16), context=5)) == count


def test_windows_of_shards_are_those_of_each_shard_in_a_row() -> None:
    parts = [
        np.arange(start, start + n, dtype=np.uint16) for start, n in ((0, 11), (50, 3), (90, 6))
    ]
    shards = [TokenWindows(part, context=5) for part in parts]
    whole = TokenShards(shards)
    assert len(whole) == 2 + 0 + 1
    expected = torch.cat([shards[0].batch(np.arange(2)), shards[2].batch(np.arange(1))])
    assert torch.equal(whole.batch(np.arange(3)), expected)
    assert torch.equal(whole.batch(torch.tensor([2, 0])), expected[[2, 0]])


def test_a_cache_folder_cut_into_shards_is_a_source(tmp_path: Path, corpus: Corpus) -> None:
    assert isinstance(corpus.train, TokenWindows)
    cut = 16 * 40 + 1
    tokens = corpus.train.tokens
    for name in ("manifest.json", "tokenizer.json", "held_out.npy", "held_out_domains.npz"):
        (tmp_path / name).write_bytes((corpus.tokenizer.parent / name).read_bytes())
    np.save(tmp_path / "train_00000.npy", tokens[:cut])
    np.save(tmp_path / "train_00001.npy", tokens[cut - 1 :])
    again = windows(tmp_path, tmp_path / "unused")
    assert len(again.train or ()) == len(corpus.train)
    indices = np.array([0, 39, 40, len(corpus.train) - 1])
    assert again.train is not None
    assert torch.equal(again.train.batch(indices), corpus.train.batch(indices))
    np.testing.assert_array_equal(again.held_out.tokens, corpus.held_out.tokens)
    assert again.held_out.domains is not None
    assert torch.equal(again.bytes_of_token, corpus.bytes_of_token)
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("vocabulary", r"data\.vocabulary 257 < 999, that of .*manifest\.json: set it so"),
        ("truncated", r"data\.source: .*train\.npy can't be read \(.*\): write it again"),
        ("missing", r"only 0 held_out tokens in 0 files"),
    ],
)
def test_a_broken_folder_of_token_files_is_named(
    change: str, message: str, tmp_path: Path, corpus: Corpus
) -> None:
    for file in corpus.tokenizer.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if change == "vocabulary":
        manifest = json.loads((tmp_path / "manifest.json").read_text()) | {"vocabulary": 999}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    if change == "truncated":
        content = (tmp_path / "train.npy").read_bytes()
        (tmp_path / "train.npy").write_bytes(content[: len(content) // 2])
    if change == "missing":
        (tmp_path / "held_out.npy").unlink()
    with pytest.raises(ConfigError, match=message):
        windows(tmp_path, tmp_path / "unused")


def copied(corpus: Corpus, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for file in corpus.tokenizer.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


MANIFESTS: dict[str, Any] = {
    "no object": [],
    "nothing": None,
    "no vocabulary": {"end_of_text": 0},
    "vocabulary in quotes": {"vocabulary": "257"},
    "negative vocabulary": {"vocabulary": -1},
    "huge vocabulary": {"vocabulary": 10**30},
    "fraction": {"vocabulary": 256.5},
    "end beyond": {"vocabulary": 257, "end_of_text": 257},
    "negative end": {"vocabulary": 257, "end_of_text": -1},
    "part of another type": {"vocabulary": 257, "train": 3},
    "other size": {"vocabulary": 257, "train": {"tokens": 3}},
    "negative size": {"vocabulary": 257, "train": {"tokens": -3}},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_can_not_be_true_is_named(
    name: str, tmp_path: Path, corpus: Corpus
) -> None:
    path = copied(corpus, tmp_path) / "manifest.json"
    path.write_text(json.dumps(MANIFESTS[name]))
    with pytest.raises(ConfigError, match=r"manifest\.json") as caught:
        windows(tmp_path, tmp_path / "unused")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[" * 10**5, b"\xff", b'{"vocabulary": ' + b"9" * 10**5])
def test_a_manifest_that_is_no_json_is_named(
    content: bytes, tmp_path: Path, corpus: Corpus
) -> None:
    path = copied(corpus, tmp_path) / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"manifest\.json is (no|not) readable JSON"):
        windows(tmp_path, tmp_path / "unused")


def of_objects() -> np.ndarray:
    return np.array([{}] * 1_000, dtype=object)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((40, 40), np.uint16), "2 axes|1 axes"),
        (np.zeros(1_000, np.float32), "holds float32"),
        (np.full(1_000, -1, np.int16), "holds int16"),
        (np.array(3, np.uint16), "of shape"),
        (np.full(1_000, 257, np.uint16), "has id 257, beyond the vocabulary of 257"),
        (of_objects(), "no array|object"),
    ],
)
@pytest.mark.parametrize("part", ["train", "held_out"])
def test_token_files_of_another_kind_are_named(
    part: str, tokens: np.ndarray, message: str, tmp_path: Path, corpus: Corpus
) -> None:
    path = copied(corpus, tmp_path) / f"{part}.npy"
    np.save(path, tokens, allow_pickle=True)
    with pytest.raises(ConfigError, match=rf"data\.source: .*{part}\.npy .*({message})"):
        windows(tmp_path, tmp_path / "unused")


def test_an_id_that_the_samples_of_a_large_file_missed_is_named_when_it_is_read() -> None:
    tokens = np.array([0, 1, 2, 3, 4, 9, 0], np.uint16)
    part = TokenWindows(tokens, context=3, vocabulary=5)
    part.batch(np.array([0]))
    with pytest.raises(CorruptDataError, match="have id 9, beyond the vocabulary of 5"):
        part.batch(np.array([0, 1]))


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_the_digest_of_token_files_covers_both_sides(
    part: str, tmp_path: Path, corpus: Corpus
) -> None:
    folder = copied(corpus, tmp_path)
    before = windows(folder, tmp_path / "unused").digest
    tokens = np.load(folder / f"{part}.npy")
    tokens[5], tokens[6] = tokens[6], tokens[5]
    assert tokens[5] != tokens[6]
    np.save(folder / f"{part}.npy", tokens)
    assert windows(folder, tmp_path / "unused").digest != before


DOMAINS: dict[str, dict[str, Any]] = {
    "names of objects": {"names": of_objects()},
    "domain without a name": {"of_document": np.array([5] * 30)},
    "negative": {"of_document": np.array([-1] * 30)},
    "fractions": {"of_document": np.zeros(30)},
    "too few": {"of_document": np.zeros(1, np.int64)},
    "another end": {"end_of_text": np.int64(7)},
    "several ends": {"end_of_text": np.zeros(3, np.int64)},
}


@pytest.mark.parametrize("name", DOMAINS)
def test_domains_of_other_documents_are_named(name: str, tmp_path: Path, corpus: Corpus) -> None:
    path = copied(corpus, tmp_path) / "held_out_domains.npz"
    with np.load(path) as saved:
        content = dict(saved) | DOMAINS[name]
    np.savez(path, **content)
    with pytest.raises(ConfigError, match=r"held_out_domains\.npz"):
        windows(tmp_path, tmp_path / "unused")


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    name=st.sampled_from(
        ["manifest.json", "tokenizer.json", "train.npy", "held_out.npy", "held_out_domains.npz"]
    ),
    share=st.floats(0, 1),
    inserted=st.binary(max_size=9),
    dropped=st.integers(0, 40),
)
def test_a_folder_with_a_damaged_file_is_read_or_refused_in_one_line(
    name: str, share: float, inserted: bytes, dropped: int, tmp_path: Path, corpus: Corpus
) -> None:
    path = copied(corpus, tmp_path) / name
    content = path.read_bytes()
    place = int(share * len(content))
    path.write_bytes(content[:place] + inserted + content[place + dropped :])
    problem = ""
    try:
        found = windows(tmp_path, tmp_path / "unused")
        assert isinstance(found.train, TokenWindows)
        found.train.batch(np.arange(len(found.train)))
        found.held_out.domains_of(np.arange(len(found.held_out)))
    except ConfigError as error:
        problem = str(error)
    assert "\n" not in problem
