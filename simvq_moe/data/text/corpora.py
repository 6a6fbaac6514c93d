"""A text corpus as token windows, under a byte-level BPE trained on its training documents.

"python-stdlib" is the running interpreter's standard library without its tests: real text that
every machine has. Any other source is a folder or file of documents, or of token files. A corpus
is encoded through `datasets` once; the token files lie in a cache folder named by the corpus'
content, so that a changed corpus is encoded anew and an equal one never is.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simvq_moe.data.held_out import FEWEST, SHARE, held_out_by_content
from simvq_moe.data.rows.base import TEXT_FIELD, CorruptDataError
from simvq_moe.data.rows.saved_sets import own_splits
from simvq_moe.data.text import tokens
from simvq_moe.data.text.cache import build_once
from simvq_moe.data.text.documents import EMBEDDED, OnCorrupt, check_readable, list_files
from simvq_moe.data.text.domains import number_domains
from simvq_moe.data.text.reading import Reading, Scanned
from simvq_moe.data.text.tokenizer import (
    BYTES,
    END_OF_TEXT,
    TOKENIZER_FILE,
    end_of_text,
    load_tokenizer,
    train_tokenizer,
)
from simvq_moe.data.text.tokens import Corpus, is_token_folder, load_tokens, write_tokens
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import printable

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer

LAYOUT = "2"
"""Names the way in which token files are made; a new one makes old caches unused."""
BY_CONTENT = " by content"
"""Says the same of sources with files of text, whose names decided their sides before."""

log = logging.getLogger(__name__)


def token_windows(
    source: str,
    *,
    vocabulary: int,
    context: int,
    cache_dir: str,
    tokenizer: str | None = None,
    on_corrupt: OnCorrupt = "stop",
    text_field: str = TEXT_FIELD,
    held_out_source: str | None = None,
) -> Corpus:
    """The windows of `source`, from the cache where an equal corpus was encoded before.

    Any number of processes may call this at once: each cache folder appears complete or not at
    all. They'd all do the same work, though, so let one rank of a machine go first.

    Args:
        source: "python-stdlib", a folder (with all its subfolders) or file of documents, or a
            folder of token files.
        vocabulary: tokens of the vocabulary, exactly, or at least those of the tokenizer given.
        context: tokens of a window, less the one that is only a target.
        cache_dir: folder of the cache folders.
        tokenizer: file or name of a tokenizer; None: one is trained on the training documents.
        on_corrupt: whether a broken file or row is left out.
        text_field: column or field of rows with the document.
        held_out_source: what held-out documents are read from; None: the source's own held-out
            split, or else a part of it.

    Raises:
        ConfigError: the source doesn't exist, holds nothing readable, is broken, or is too small
            for the vocabulary or for one window.
    """
    _check_own_part(source, held_out_source)
    if is_token_folder(source):
        return load_tokens(Path(source), source=source, vocabulary=vocabulary, context=context)
    check_vocabulary(vocabulary)
    given = None if tokenizer is None else load_tokenizer(tokenizer, vocabulary)
    source, held_out_source = own_splits(source, held_out_source)
    reading = Reading(text_field, on_corrupt)
    try:
        whole = reading.scan(source)
        held_out = None if held_out_source is None else reading.scan(held_out_source)
        encoding = _Encoding(vocabulary, given, reading, whole, held_out)
        folder = Path(cache_dir) / f"text-{encoding.name}"
        build_once(folder, encoding.write, f"encoding {source}")
    except CorruptDataError as error:
        raise ConfigError(f"data.source {source!r} can't be read: {error}") from None
    corpus = load_tokens(folder, source=source, vocabulary=vocabulary, context=context)
    return replace(corpus, digest=folder.name)


def _check_own_part(source: str, held_out_source: str | None) -> None:
    """Refuse a held-out source beside token files, or of them."""
    for one, key in ((source, "data.source"), (held_out_source, "data.held_out_source")):
        if held_out_source is not None and one is not None and is_token_folder(one):
            raise ConfigError(
                f"{key} {one!r} is a folder of token files, which has a held-out part of its own: "
                "drop data.held_out_source"
            )


@dataclass(frozen=True)
class _Encoding:
    """What is encoded, and how."""

    vocabulary: int
    given: Tokenizer | None
    """None: a tokenizer is trained on the training documents."""
    reading: Reading
    whole: Scanned
    held_out: Scanned | None
    """None: a part of the whole is held out."""

    @property
    def name(self) -> str:
        """What tells its token files from those of every other."""
        key = f"{LAYOUT} {self.vocabulary} {self.whole.digest}{digest_of_tokenizer(self.given)}"
        key += " skip" if self.reading.on_corrupt == "skip" else ""
        key += "" if all(file.has_rows for file in self.whole.files) else BY_CONTENT
        key += "" if self.reading.field == TEXT_FIELD else f" field {self.reading.field}"
        key += "" if self.held_out is None else f" held out {self.held_out.digest}"
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    def write(self, built: Path, scratch: Path) -> None:
        """Write the token files into `built`."""
        source = self.whole.source
        documents = self.reading.read(self.whole.files, scratch / "source")
        if self.held_out is None:
            train, held_out = _split(documents, embedded=source == EMBEDDED)
        else:
            held_out = self.reading.read(self.held_out.files, scratch / "held_out")
            train = _not_among(documents, held_out, source, self.held_out.source)
        texts = (batch["text"] for batch in tokens.batches(train, 64))
        write_corpus(
            built,
            self.given or train_tokenizer(texts, self.vocabulary),
            {"train": train, "held_out": held_out},
            {"source": source, "files": len(self.whole.files)},
        )


def check_source(
    source: str, *, text_field: str = TEXT_FIELD, held_out_source: str | None = None
) -> None:
    """Make sure that there is text; stops at the first readable file.

    Raises:
        ConfigError: a source doesn't exist, or holds nothing readable.
    """
    for one in own_splits(source, held_out_source):
        if one is not None and not is_token_folder(one):
            check_readable(one, list_files(one), text_field)


def check_vocabulary(vocabulary: int) -> None:
    """Raise `ConfigError` for a vocabulary that lacks a byte."""
    if vocabulary < BYTES:
        raise ConfigError(
            f"data.vocabulary {vocabulary} < {BYTES}: the bytes and {END_OF_TEXT} need that many: "
            "raise it"
        )


def digest_of_tokenizer(given: Tokenizer | None) -> str:
    """A digest of a tokenizer's content; empty for one that is still to be trained."""
    return "" if given is None else hashlib.sha256(given.to_str().encode()).hexdigest()


def write_corpus(
    folder: Path, tokenizer: Tokenizer, parts: dict[str, Dataset], of_source: dict[str, Any]
) -> None:
    """Write a folder of token files: documents with columns "text" and "domain" by part."""
    end = end_of_text(tokenizer)
    tokenizer.save(str(folder / TOKENIZER_FILE))
    size = 1 + max(tokenizer.get_vocab().values())
    manifest = of_source | {"vocabulary": size, "end_of_text": end}
    for part, documents in parts.items():
        written = write_tokens(documents, tokenizer, end, folder / f"{part}.npy")
        manifest[part] = {"documents": len(documents), "tokens": written}
    domains = number_domains(list(parts["held_out"]["domain"]), end)
    domains.save(folder / tokens.DOMAINS)
    (folder / tokens.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _split(documents: Dataset, *, embedded: bool) -> tuple[Dataset, Dataset]:
    """Training and held-out documents."""
    from datasets import Dataset

    keys = list(documents["key"])
    if len(set(keys)) >= FEWEST:
        names = list(documents["name"]) if embedded else None
        is_held_out = np.array(held_out_by_content(keys, SHARE, names=names))
        train, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
        return documents.select(train), documents.select(held_out)
    texts, of = list(documents["text"]), list(documents["domain"])
    ends = [round((1 - SHARE) * len(text)) for text in texts]
    parts = zip(texts, ends, strict=True)
    train, held_out = zip(*((text[:end], text[end:]) for text, end in parts), strict=True)
    return (
        Dataset.from_dict({"domain": of, "text": list(train)}),
        Dataset.from_dict({"domain": of, "text": list(held_out)}),
    )


def _not_among(documents: Dataset, held_out: Dataset, source: str, held_out_source: str) -> Dataset:
    """Documents without copies of held-out ones: their source may lie inside the other."""
    unseen = set(held_out["key"])
    kept = [i for i, key in enumerate(documents["key"]) if key not in unseen]
    if not kept:
        raise CorruptDataError(
            f"data.held_out_source {held_out_source!r} holds every document of it: give another "
            "one, or drop it"
        )
    if left_out := len(documents) - len(kept):
        here, there = printable(source), printable(held_out_source)
        log.info("%s: %d documents are in %s as well, and held out", here, left_out, there)
    return documents.select(kept)
