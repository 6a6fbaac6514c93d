"""Tokenizers of bytes alone and of others: every token stands for its bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from simvq_moe.data.text import token_windows
from simvq_moe.data.tokenizer import bytes_of_token, end_of_text, load_tokenizer, train_tokenizer
from simvq_moe.data.tokens import Corpus, TokenWindows
from simvq_moe.merging import ConfigError

TEXT = "    def naïve(漢字):\n\treturn '🙂'  # twice\n"


def foreign(**change: Any) -> Tokenizer:
    """A byte-level tokenizer as others publish them: its end is not token 0, it adds a start of its
    own accord, and runs of spaces are added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = change.pop("special", ["<s>", "</s>"])
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    tokenizer.add_tokens(["    "])
    if "<s>" in special:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    for name, value in change.items():
        setattr(tokenizer, name, value)
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def corpus_of(folder: Path, **settings: Any) -> Corpus:
    (folder / "texts").mkdir()
    for i in range(30):
        (folder / "texts" / f"{i}.txt").write_text(f"{i}{TEXT}" * 9)
    return token_windows(str(folder / "texts"), context=8, cache_dir=str(folder / "c"), **settings)


def test_257_tokens_are_the_bytes_and_the_end_so_bits_per_byte_are_bits_per_token(
    tmp_path: Path,
) -> None:
    corpus = corpus_of(tmp_path, vocabulary=257)
    assert corpus.bytes_of_token.tolist() == [0, *[1] * 256]
    assert isinstance(corpus.train, TokenWindows)
    size = sum(len(f.read_bytes()) for f in (tmp_path / "texts").iterdir())
    tokens = np.concatenate([corpus.train.tokens, corpus.held_out.tokens])
    assert int(corpus.bytes_of_token[tokens.astype(np.int64)].sum()) == size
    assert len(tokens) == size + 30
    assert TEXT in corpus.decode(corpus.train.tokens)


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_given_tokenizer_encodes_to_the_byte_and_ends_documents_with_its_own_end(
    tmp_path: Path, as_folder: bool
) -> None:
    path = saved(foreign(), tmp_path / "tokenizer")
    name = str(path.parent if as_folder else path)
    corpus = corpus_of(tmp_path, vocabulary=300, tokenizer=name)
    assert isinstance(corpus.train, TokenWindows)
    assert corpus.end_of_text == 1
    assert len(corpus.bytes_of_token) == 300
    size = sum(len(f.read_bytes()) for f in (tmp_path / "texts").iterdir())
    tokens = np.concatenate([corpus.train.tokens, corpus.held_out.tokens]).astype(np.int64)
    assert int(corpus.bytes_of_token[tokens].sum()) == size
    assert [np.count_nonzero(tokens == i) for i in (0, 1)] == [0, 30]
    domains = corpus.held_out.domains
    assert domains is not None
    assert len(domains.of_document) == (corpus.held_out.tokens == 1).sum()


def test_added_tokens_that_are_not_special_count_their_bytes(tmp_path: Path) -> None:
    path = saved(foreign(), tmp_path)
    spaces = foreign().token_to_id("    ")
    assert spaces is not None
    lengths = bytes_of_token(path, 300)
    assert lengths[:2].tolist() == [0, 0]
    assert int(lengths[spaces]) == 4
    assert lengths[spaces + 1 :].sum() == 0


def test_tokenizers_of_equal_content_share_a_cache_and_others_do_not(tmp_path: Path) -> None:
    names = [str(saved(foreign(), tmp_path / name)) for name in ("one", "two")]
    names.append(str(saved(train_tokenizer([[TEXT * 9]], 270), tmp_path / "three")))
    found = []
    for i, name in enumerate(names):
        (tmp_path / str(i)).mkdir()
        found.append(corpus_of(tmp_path / str(i), vocabulary=300, tokenizer=name).digest)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": decoders.Metaspace()}, "is not byte-level, so bits per byte would be wrong"),
        ({"special": ["<s>", "<stop>"]}, "has no end of text, one of .*: add one"),
        ({}, r"has 281 tokens > data\.vocabulary 270: set data\.vocabulary to 281"),
    ],
    ids=["not byte-level", "no end", "too large"],
)
def test_a_tokenizer_that_does_not_do_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = saved(foreign(**change), tmp_path)
    with pytest.raises(ConfigError, match=rf"data\.tokenizer .*tokenizer\.json' {message}"):
        load_tokenizer(str(path), 270)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": None}))
    with pytest.raises(ConfigError, match=r"data\.tokenizer .* can't be loaded \("):
        load_tokenizer(str(path), 300)


def test_the_end_of_text_is_the_first_known_name_that_the_tokenizer_has() -> None:
    assert end_of_text(foreign()) == 1
    assert end_of_text(train_tokenizer([], 257)) == 0
    ids = train_tokenizer([], 257).encode("aä").ids
    assert torch.tensor(ids).shape == (3,)
