"""Tokenizers of bytes alone and of others: every token stands for its bytes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from simvq_moe.data.text.corpora import token_windows
from simvq_moe.data.text.tokenizer import (
    bytes_of_token,
    encode_text,
    end_of_text,
    load_tokenizer,
    open_tokenizer,
    train_tokenizer,
)
from simvq_moe.data.text.tokens import Corpus, TokenWindows
from simvq_moe.errors import ConfigError

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


QUOTED = "E\u0301  naïve  naive   </s>    <s> ﬁ\u00a0\r\n" + TEXT * 3
Content = dict[str, Any]
Change = Callable[[Content], Any]


def changed(folder: Path, change: Change) -> Path:
    """The tokenizer.json of others with a change to its content."""
    path = saved(foreign(), folder)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def added(c: Content, **options: Any) -> None:
    """One more added token."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    c["added_tokens"].append(flags | {"id": 281, "content": "naive"} | options)


TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 500},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<s>",
}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
LOSSES: dict[str, Change] = {
    "truncation": lambda c: c.update(truncation=TRUNCATION),
    "padding": lambda c: c.update(padding=PADDING),
    "normalizer": lambda c: c.update(normalizer={"type": "NFKC"}),
    "lower case": lambda c: c.update(normalizer={"type": "Lowercase"}),
    "dropout": lambda c: c["model"].update(dropout=0.5),
    "prefix": lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
    "stripping": lambda c: added(c, lstrip=True, rstrip=True),
    "removal": lambda c: c.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT, c["pre_tokenizer"]]}
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_cuts_pads_or_changes_a_text_is_left_out_of_a_tokenizer_and_said(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = changed(tmp_path, LOSSES[name])
    given = Tokenizer.from_file(str(path))
    given.encode_special_tokens = True
    plain = load_tokenizer(str(saved(foreign(), tmp_path / "plain")), 300)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(str(path), 300)
    assert "documents are encoded without its" in caplog.text
    ids = encode_text(tokenizer, QUOTED)
    assert tokenizer.decode(ids, skip_special_tokens=False) == QUOTED
    assert ids == encode_text(tokenizer, QUOTED)
    assert not {0, 1} & set(ids)
    if name not in ("stripping", "removal"):  # which add a token and a cut
        assert ids == encode_text(plain, QUOTED)
    # the cases can fail
    lossy = given.encode(QUOTED, add_special_tokens=False)
    assert given.decode(lossy.ids) != QUOTED or lossy.ids != ids


def test_a_prompt_is_encoded_as_a_document_also_by_a_tokenizer_as_it_is_in_a_file(
    tmp_path: Path,
) -> None:
    path = changed(tmp_path, lambda c: c.update(truncation=TRUNCATION, padding=PADDING))
    expected = encode_text(load_tokenizer(str(path), 300), QUOTED)
    assert encode_text(open_tokenizer(path), QUOTED) == expected
    with pytest.raises(ConfigError, match="a text is not UTF-8"):
        encode_text(open_tokenizer(path), "half a pair \ud800")


def test_a_tokenizer_that_only_cuts_is_taken_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = changed(
        tmp_path, lambda c: c.update(post_processor={"type": "ByteLevel"} | c["pre_tokenizer"])
    )
    assert load_tokenizer(str(path), 300).to_str() == Tokenizer.from_file(str(path)).to_str()
    assert not caplog.records


@pytest.mark.parametrize("known", ["plain token", "of the vocabulary alone"])
def test_text_that_quotes_the_end_does_not_end_there_though_the_end_is_not_special(
    known: str, tmp_path: Path
) -> None:
    def change(content: Content) -> None:
        if known == "plain token":
            content["added_tokens"][1]["special"] = False
        else:
            del content["added_tokens"][1]

    tokenizer = load_tokenizer(str(changed(tmp_path, change)), 300)
    assert end_of_text(tokenizer) == 1
    assert 1 not in encode_text(tokenizer, "a</s>b")
    path = saved(tokenizer, tmp_path / "saved")
    assert int(bytes_of_token(path, 300)[1]) == 0


REFUSED: dict[str, tuple[Change, str]] = {
    "a byte is missing": (lambda c: c["model"]["vocab"].pop("Ċ"), "not keep every byte"),
    "two tokens of an id": (lambda c: c["model"]["vocab"].update({"Ċ": 9}), "not keep every byte"),
    "special token of text": (lambda c: added(c, content="Ċ", special=True), "not keep every byte"),
    "removed spaces": (
        lambda c: c.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [{"type": "WhitespaceSplit"}, c["pre_tokenizer"]],
            }
        ),
        "is not byte-level",
    ),
    "mapped twice": (
        lambda c: c.update(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [c["pre_tokenizer"]] * 2}
        ),
        "is not byte-level",
    ),
    "no pre-tokenizer": (lambda c: c.update(pre_tokenizer=None), "is not byte-level"),
    "marks of words": (lambda c: c["model"].update(end_of_word_suffix="</w>"), "is not byte-level"),
    "marks within words": (
        lambda c: c["model"].update(continuing_subword_prefix="##"),
        "is not byte-level",
    ),
    "unigrams": (lambda c: c["model"].update(type="Unigram"), "is not byte-level"),
    "huge id": (lambda c: c["model"]["vocab"].update({"zz": 10**9}), r"1000000001 tokens > data"),
    "id of no size": (lambda c: c["model"]["vocab"].update({"zz": 10**30}), "can't be loaded"),
    "negative id": (lambda c: c["added_tokens"][0].update(id=-1), "can't be loaded"),
    "id in quotes": (lambda c: c["model"]["vocab"].update({"zz": "9"}), "can't be loaded"),
    "unigrams' vocabulary": (lambda c: c["model"].update(vocab=[["a", 0.5]]), "can't be loaded"),
    "merges of nothing": (lambda c: c["model"].update(merges=[["no", "such"]]), "can't be loaded"),
    "impossible dropout": (lambda c: c.update(version="9"), "can't be loaded"),
    "no model": (lambda c: c.pop("model"), "can't be loaded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_can_not_keep_texts_is_refused_in_one_line(
    name: str, tmp_path: Path
) -> None:
    change, message = REFUSED[name]
    path = changed(tmp_path, change)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(str(path), 300)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[" * 100_000, b'{"model": ' * 10_000, b"[]", b"null", b"NaN", b"1" * 10_000],
    ids=["empty", "no UTF-8", "deep", "deep keys", "list", "null", "NaN", "huge"],
)
def test_a_file_of_other_content_is_no_tokenizer(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="can't be loaded"):
        load_tokenizer(str(path), 300)
    for read in (open_tokenizer, lambda path: bytes_of_token(path, 300)):
        with pytest.raises(ConfigError, match=r"tokenizer\.json (is no|has content)"):
            read(path)


def test_a_file_with_a_token_beyond_the_vocabulary_is_named(tmp_path: Path) -> None:
    path = saved(foreign(), tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer\.json has token 280, beyond .* of 280"):
        bytes_of_token(path, 280)


@pytest.mark.parametrize("name", ["no such/name/at all", "a\0b", "n" * 5_000, "/dev/null", "/dev"])
def test_a_name_that_stands_for_no_tokenizer_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"data\.tokenizer .* can't be loaded"):
        load_tokenizer(name, 300)
