"""Windows miss no target, and token files of any number are one set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from simvq_moe.data.text import token_windows
from simvq_moe.data.tokens import Corpus, TokenShards, TokenWindows
from simvq_moe.merging import ConfigError


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
