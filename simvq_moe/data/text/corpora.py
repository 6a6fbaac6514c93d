"""A text corpus as token windows, under a byte-level BPE trained on its training documents.

"python-stdlib" is the running interpreter's standard library without its tests: real text that
every machine has. Any other source is a folder or file of documents, or of token files. A corpus
is encoded through `datasets` once; the token files lie in a cache folder named by the corpus'
content, so that a changed corpus is encoded anew and an equal one never is.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simvq_moe.data.held_out import held_out_by_content
from simvq_moe.data.rows.base import (
    BUFFER,
    TEXT_FIELD,
    CorruptDataError,
    Defect,
    Rows,
    UnreachableError,
)
from simvq_moe.data.rows.saved_sets import own_splits
from simvq_moe.data.text import tokens
from simvq_moe.data.text.documents import (
    EMBEDDED,
    WAY_OUT,
    Defects,
    File,
    OnCorrupt,
    check_readable,
    content_name,
    first_defect,
    list_files,
    nothing_readable,
    read_rows,
)
from simvq_moe.data.text.domains import domain_of, number_domains
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
from simvq_moe.files.locks import alone, in_turn
from simvq_moe.files.regular import printable, sync_folder

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer

HELD_OUT_SHARE = 0.1
"""Share of the different documents that is held out."""
DOCUMENTS_TO_SPLIT_BY_DOCUMENT = 20
"""The end of each document is held out instead where fewer of them are different."""
LAYOUT = "2"
"""Names the way in which token files are made; a new one makes old caches unused."""
BY_CONTENT = " by content"
"""Says the same of sources with files of text, whose names decided their sides before."""

COLUMNS = ("key", "name", "domain", "text")
ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 1024, 2**24
"""Documents that wait in memory until they are written, or one more than so long together."""

BUILDING = "building-"
"""Beginning of the name of a folder that is being built in the cache; its builder holds it."""
SECONDS_TO_BUILD = 7 * 86_400.0
"""After which a folder without a lock is taken for left over."""

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
    for one, key in ((source, "data.source"), (held_out_source, "data.held_out_source")):
        if held_out_source is not None and one is not None and is_token_folder(one):
            raise ConfigError(
                f"{key} {one!r} is a folder of token files, which has a held-out part of its own: "
                "drop data.held_out_source"
            )
    if is_token_folder(source):
        return load_tokens(Path(source), source=source, vocabulary=vocabulary, context=context)
    check_vocabulary(vocabulary)
    given = None if tokenizer is None else load_tokenizer(tokenizer, vocabulary)
    source, held_out_source = own_splits(source, held_out_source)
    try:
        reading = _Reading(text_field, on_corrupt)
        files, digest = reading.scan(source)
        key = f"{LAYOUT} {vocabulary} {digest}{digest_of_tokenizer(given)}"
        key += " skip" if on_corrupt == "skip" else ""
        key += "" if all(file.has_rows for file in files) else BY_CONTENT
        key += "" if text_field == TEXT_FIELD else f" field {text_field}"
        held_out_files: list[File] | None = None
        if held_out_source is not None:
            held_out_files, digest = reading.scan(held_out_source)
            key += f" held out {digest}"
        folder = Path(cache_dir) / f"text-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if not folder.exists():
            log.info("encoding %s into %s", source, folder)

            def fill(built: Path, scratch: Path) -> None:
                documents = reading.read(files, scratch / "source")
                if held_out_files is None:
                    train, held_out = _split(documents, embedded=source == EMBEDDED)
                else:
                    held_out = reading.read(held_out_files, scratch / "held_out")
                    train = _not_among(documents, held_out, source, str(held_out_source))
                texts = (batch["text"] for batch in tokens.batches(train, 64))
                write_corpus(
                    *(built, given or train_tokenizer(texts, vocabulary)),
                    {"train": train, "held_out": held_out},
                    {"source": source, "files": len(files)},
                )

            build_once(folder, fill)
    except CorruptDataError as error:
        raise ConfigError(f"data.source {source!r} can't be read: {error}") from None
    corpus = load_tokens(folder, source=source, vocabulary=vocabulary, context=context)
    return replace(corpus, digest=folder.name)


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


def build_once(folder: Path, fill: Callable[[Path, Path], None]) -> None:
    """Make a folder of the cache: aside, then renamed into place, so that nobody sees half of it.

    Args:
        fill: writes into its first argument, and what is needed for that into the second.
    """
    fresh = not folder.parent.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _aside(folder.parent) as aside, _quiet():
            built = Path(aside, "built")
            built.mkdir()
            fill(built, Path(aside, "scratch"))
            for path in built.rglob("*"):
                if path.is_file():
                    with path.open("rb+") as file:
                        os.fsync(file.fileno())
            sync_folder(built)
            try:
                built.rename(folder)
            except OSError:
                # another process was faster, and its folder is as good
                if not folder.exists():
                    raise
            sync_folder(folder.parent)
    except (ConfigError, CorruptDataError):
        if fresh:
            with suppress(OSError):
                folder.parent.rmdir()
        raise


@contextmanager
def _aside(cache: Path) -> Iterator[Path]:
    """A folder to build in, held by this process; what ended processes were building is removed.

    It is made and held in one turn of the cache: between the two it would look left over.
    """
    with ExitStack() as kept:
        with in_turn(cache):
            _remove_left_over(cache)
            made = tempfile.TemporaryDirectory(prefix=BUILDING, dir=cache)
            aside = Path(kept.enter_context(made))
            kept.enter_context(in_turn(aside))
        yield aside


def _remove_left_over(cache: Path) -> None:
    """Remove what processes that have ended were building: a living one holds its folder."""
    for aside in cache.glob(f"{BUILDING}*"):
        with suppress(ConfigError, OSError), alone(aside, "it is being built") as held:
            if held or time.time() - aside.stat().st_mtime > SECONDS_TO_BUILD:
                shutil.rmtree(aside)


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


@dataclass(frozen=True)
class _Reading:
    """How the files of a source are read."""

    field: str
    """Column or field of rows with the document."""
    on_corrupt: OnCorrupt

    def scan(self, source: str) -> tuple[list[File], str]:
        """The readable files, and a digest of their names and contents."""
        defects, without = Defects(self.on_corrupt), None
        digest, readable, skipped = hashlib.sha256(), [], []
        for file in list_files(source):
            defect = first_defect(file.path, self.field)
            if defect is not None and not defect.of_another_kind:
                defects.meet(defect)
            content = _digest(file) if defect is None or not defect.of_another_kind else None
            if content is None:
                skipped.append(file)
                without = without or (defect if file.has_rows else None)
                continue
            readable.append(file)
            digest.update(os.fsencode(f"{file.name}\0{content}\n"))
        if not readable:
            raise nothing_readable(source, without)
        if skipped:
            names = [printable(file.name) for file in skipped[:5]]
            some = ", ".join(names) + (", ..." if skipped[5:] else "")
            log.warning("%s: skipped %d files without UTF-8 text: %s", source, len(skipped), some)
        return readable, digest.hexdigest()

    def read(self, files: list[File], scratch: Path) -> Dataset:
        """Every document, with its domain, its content's key and its file's name.

        Through a file, because they may not fit into memory; `Dataset.from_generator` would need a
        file system with locks.
        """
        import pyarrow as pa
        from datasets import Dataset

        schema = pa.schema([(name, pa.string()) for name in COLUMNS])
        scratch.mkdir(parents=True)
        path = scratch / "documents.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            rows, length = [], 0
            for document in self._documents(files):
                rows.append(document)
                length += len(document["text"])
                if length > CHARACTERS_AT_ONCE or len(rows) == ROWS_AT_ONCE:
                    writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
                    rows, length = [], 0
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
        return Dataset.from_file(str(path))

    def _documents(self, files: list[File]) -> Iterator[dict[str, str]]:
        defects, any_text = Defects(self.on_corrupt), False
        for file in files:
            domain = domain_of(file.name, rows=file.has_rows)
            for _, found in read_rows(file.path, Rows(field=self.field)):
                if isinstance(found, Defect):
                    defects.meet(found)
                else:
                    key = content_name(found)
                    # a name of bytes that are no UTF-8 is no string of a data set
                    name = printable(file.name)
                    yield {"key": key, "name": name, "domain": domain, "text": found}
                    any_text = True
        if not any_text:  # `datasets` can't hold nothing
            raise CorruptDataError(f"it holds no readable text: {WAY_OUT}")


def _digest(file: File) -> str | None:
    """SHA-256 of the content; None: a document that isn't UTF-8."""
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    try:
        with file.path.open("rb", buffering=0) as opened:
            while block := opened.read(BUFFER):
                digest.update(block)
                if not file.has_rows:
                    decoder.decode(block)
        decoder.decode(b"", final=True)
    except OSError as error:
        raise UnreachableError(file.path, error) from None
    except UnicodeDecodeError:
        return None
    return digest.hexdigest()


def _split(documents: Dataset, *, embedded: bool) -> tuple[Dataset, Dataset]:
    """Training and held-out documents."""
    from datasets import Dataset

    keys = list(documents["key"])
    if len(set(keys)) >= DOCUMENTS_TO_SPLIT_BY_DOCUMENT:
        names = list(documents["name"]) if embedded else None
        is_held_out = np.array(held_out_by_content(keys, HELD_OUT_SHARE, names=names))
        train, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
        return documents.select(train), documents.select(held_out)
    texts, of = list(documents["text"]), list(documents["domain"])
    ends = [round((1 - HELD_OUT_SHARE) * len(text)) for text in texts]
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`, which are its own global switch."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
