"""Every held-out token knows which part of the source it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from simvq_moe.data.text.corpora import token_windows
from simvq_moe.data.text.domains import Domains, domain_of
from simvq_moe.data.text.tokens import TokenWindows


@pytest.mark.parametrize(
    ("name", "rows", "domain"),
    [
        ("asyncio/events.py", False, "asyncio"),
        ("a/b/c.txt", False, "a"),
        ("argparse.py", False, ".py"),
        ("NOTES.MD", False, ".md"),
        ("wiki.jsonl", True, "wiki"),
        ("web/part-3.parquet", True, "web"),
    ],
)
def test_a_domain_is_the_top_folder_or_else_the_type_or_the_file_of_rows(
    name: str, rows: bool, domain: str
) -> None:
    assert domain_of(name, rows=rows) == domain


def test_a_token_has_the_domain_of_its_document_and_the_end_belongs_to_it() -> None:
    tokens = np.array([5, 5, 0, 0, 7, 7, 7, 0, 9, 0, 1], dtype=np.uint16)
    domains = Domains(("a", "b"), np.array([0, 1, 1, 0, 1]))
    expected, document = [], 0
    for token in tokens:
        expected.append(int(domains.of_document[document]))
        document += token == 0
    assert domains.of_tokens(tokens, np.arange(11)).tolist() == expected
    windows = TokenWindows(tokens, 5, domains)
    found = windows.domains_of(np.array([1, 0]))
    assert found is not None
    assert found.tolist() == [expected[5:10], expected[:5]]
    assert TokenWindows(tokens, 5).domains_of(np.array([0])) is None


def words(domain: str, seed: int) -> str:
    numbers = np.random.default_rng(seed).integers(1000, size=100)
    return " ".join(f"{domain}{n}" for n in numbers)


@pytest.mark.parametrize("documents", [3, 40], ids=["ends held out", "documents held out"])
def test_held_out_tokens_of_a_corpus_decode_to_words_of_their_domain(
    tmp_path: Path, documents: int
) -> None:
    source = tmp_path / "source"
    for domain in ("red", "blue"):
        (source / domain).mkdir(parents=True)
        for i in range(documents):
            (source / domain / f"{i}.txt").write_text(words(domain, i))
    rows = [{"text": words("green", 1000 + i)} for i in range(documents)]
    (source / "green.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cache = str(tmp_path / "cache")
    corpus = token_windows(str(source), vocabulary=300, context=8, cache_dir=cache)
    windows = corpus.held_out
    labels = windows.domains_of(np.arange(len(windows)))
    assert labels is not None
    assert windows.domains is not None
    inputs = windows.batch(np.arange(len(windows)))[:, :-1].numpy()
    names = windows.domains.names
    for i in np.unique(labels):
        text = corpus.decode(inputs[labels == i])
        others = [name for name in ("red", "blue", "green") if name != names[i]]
        assert names[i] in text
        assert not [name for name in others if name in text]
    assert len(np.unique(labels)) >= 2
