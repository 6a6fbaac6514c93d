"""Token windows of a text corpus, under a byte-level BPE trained on its training documents.

"python-stdlib" is the running interpreter's standard library without its tests: real text that
every machine has. Any other source is a folder or file of text, JSON lines or parquet. The corpus
is read and encoded through `datasets` once; the token files lie in a cache folder named by the
corpus' content, so that a changed corpus is encoded anew and an equal one never is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Int64, Integer, UInt
from torch import Tensor

from simvq_moe.data.domains import Domains, domain_of, load_domains, number_domains
from simvq_moe.data.order import Indices, held_out_by_name
from simvq_moe.merging import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
"""Ends every document; token 0."""
PROSE = frozenset([".txt", ".md", ".rst", ".tex", ".html"])
CODE = frozenset(
    [".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts"]
)
TEXT_SUFFIXES = PROSE | CODE
"""Files that are one document each."""
ROW_SUFFIXES = frozenset([".jsonl", ".parquet"])
"""Files of which each row is a document, in the column "text"."""
HELD_OUT_SHARE = 0.1
"""Share of the documents that is held out."""
DOCUMENTS_TO_SPLIT_BY_DOCUMENT = 20
"""With fewer different documents the end of each one is held out instead."""
NO_LIBRARY = frozenset(["site-packages", "dist-packages", "__pycache__"])
TESTS = frozenset(["test", "tests", "idle_test"])
GENERATED_TABLES = frozenset(["encodings", "pydoc_data"])
STDLIB_WITHOUT = NO_LIBRARY | TESTS | GENERATED_TABLES
"""Folders of the standard library that "python-stdlib" leaves out."""
SMALLEST_VOCABULARY = 257
"""Every byte and the end of text."""
DOMAINS = "held_out_domains.npz"
LAYOUT = "2"
"""Names the way in which token files are made; a new one makes old caches unused."""
WAY_OUT = (
    "give a folder or file of text (.txt, .md, .py, ...), .jsonl or .parquet (field 'text'), or "
    "'python-stdlib'"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenWindows:
    """A row of token ids, cut into windows that overlap by one token.

    Window i holds the tokens from i * context to (i + 1) * context inclusive: the last one is only
    a target there and the first input of the next, so every token but the first is a target once.
    """

    tokens: UInt[np.ndarray, " tokens"]
    context: int
    domains: Domains | None = None
    """Of the documents; None: not known."""

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.context

    def batch(self, indices: Indices) -> Int64[Tensor, "batch window"]:
        """The windows named by indices, each of context + 1 tokens."""
        starts = np.asarray(indices)[:, None] * self.context
        return torch.from_numpy(self.tokens[starts + np.arange(self.context + 1)].astype(np.int64))

    def domains_of(self, indices: Indices) -> Int64[np.ndarray, "batch context"] | None:
        """Domains of the windows' inputs, numbers of `domains.names`."""
        if self.domains is None:
            return None
        starts = np.asarray(indices)[:, None] * self.context
        return self.domains.of_tokens(self.tokens, starts + np.arange(self.context))


@dataclass(frozen=True)
class Corpus:
    """Both sides of a corpus and what its tokens stand for."""

    train: TokenWindows
    held_out: TokenWindows
    tokenizer: Path
    """A tokenizer.json that `tokenizers` and `transformers` load."""
    bytes_of_token: Int64[Tensor, " vocabulary"]
    """UTF-8 bytes that each id stands for, 0 for the end of text: the unit of bits per byte."""

    def decode(self, ids: Integer[Tensor, " tokens"] | Integer[np.ndarray, " tokens"]) -> str:
        """The text of the ids, with the ends of documents left out."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.tokenizer)).decode(np.asarray(ids).tolist())


def token_windows(
    source: str,
    *,
    vocabulary: int,
    context: int,
    cache_dir: str,
    tokenizer: Path | None = None,
) -> Corpus:
    """The windows of `source`, from the cache where an equal corpus was encoded before.

    Any number of processes may call this at once: each cache folder appears complete or not at
    all. They'd all do the same work, though, so let one rank of a machine go first.

    Args:
        source: "python-stdlib", or a folder (with all its subfolders) or file of documents.
        vocabulary: tokens of the vocabulary, exactly.
        context: tokens of a window, less the one that is only a target.
        cache_dir: folder of the cache folders.
        tokenizer: file of a trained tokenizer; None: one is trained on the training documents.

    Raises:
        ConfigError: the source doesn't exist, holds nothing readable, or is too small for the
            vocabulary or for one window.
    """
    if vocabulary < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"data.vocabulary {vocabulary} < {SMALLEST_VOCABULARY}: the bytes and {END_OF_TEXT} "
            f"need that many: raise it"
        )
    files, digest = _scan(source)
    given = "" if tokenizer is None else hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    key = hashlib.sha256(f"{LAYOUT} {vocabulary} {digest}{given}".encode()).hexdigest()[:16]
    folder = Path(cache_dir) / f"text-{key}"
    if not folder.exists():
        log.info("encoding %s into %s", source, folder)
        _build(source, files, vocabulary, folder, tokenizer)
    train, held_out = (
        TokenWindows(np.load(folder / f"{part}.npy", mmap_mode="r"), context)
        for part in ("train", "held_out")
    )
    held_out = replace(held_out, domains=load_domains(folder / DOMAINS))
    if not (len(train) and len(held_out)):
        raise ConfigError(
            f"data.context {context}: data.source {source!r} has only {len(train.tokens)} training "
            f"and {len(held_out.tokens)} held-out tokens: lower it or give more text"
        )
    used = folder / "tokenizer.json"
    return Corpus(train, held_out, used, _bytes_of_token(used))


def check_source(source: str) -> None:
    """Make sure that there is text; stops at the first readable file.

    Raises:
        ConfigError: the source doesn't exist, or holds nothing readable.
    """
    if not any(_opens(file.path) for file in _files(source)):
        raise ConfigError(f"data.source {source!r} holds no readable text: {WAY_OUT}")


class _File(NamedTuple):
    path: Path
    name: str
    """The path inside the source: the same on every machine."""


def _files(source: str) -> list[_File]:
    """Every file that may hold documents (an empty one can't), in order of its name."""
    stdlib = source == "python-stdlib"
    root = Path(sysconfig.get_path("stdlib") if stdlib else source)
    if root.is_file():
        return [_File(root, root.name)]
    if not root.is_dir():
        raise ConfigError(f"data.source {source!r} does not exist: {WAY_OUT}")
    suffixes = frozenset([".py"]) if stdlib else TEXT_SUFFIXES | ROW_SUFFIXES
    found = []
    for folder, subfolders, names in os.walk(root):
        left_out = STDLIB_WITHOUT if stdlib else frozenset[str]()
        subfolders[:] = [s for s in subfolders if s not in left_out and not s.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        paths = [path for path in paths if path.suffix.lower() in suffixes and path.is_file()]
        found += [path for path in paths if path.stat().st_size]
    return sorted(
        (_File(path, path.relative_to(root).as_posix()) for path in found),
        key=lambda file: file.name,
    )


def _opens(path: Path) -> bool:
    """Whether the file starts as text, or has rows with a text."""
    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow import parquet

            return "text" in parquet.read_schema(path).names
        with path.open(encoding="utf-8") as file:
            if path.suffix.lower() == ".jsonl":
                return isinstance(json.loads(file.readline())["text"], str)
            return bool(file.read(4096))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _scan(source: str) -> tuple[list[_File], str]:
    """The readable files, and a digest of their names and contents."""
    digest, readable, skipped = hashlib.sha256(), [], []
    for file in _files(source):
        content = _digest(file.path) if _opens(file.path) else None
        if content is None:
            skipped.append(file)
            continue
        readable.append(file)
        digest.update(os.fsencode(f"{file.name}\0{content}\n"))
    if not readable:
        raise ConfigError(f"data.source {source!r} holds no readable text: {WAY_OUT}")
    if skipped:
        some = ", ".join(file.name for file in skipped[:5]) + (", ..." if skipped[5:] else "")
        log.warning("%s: skipped %d files without UTF-8 text: %s", source, len(skipped), some)
    return readable, digest.hexdigest()


def _digest(path: Path) -> str | None:
    """SHA-256 of the content; None: a document that isn't UTF-8."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if path.suffix.lower() not in ROW_SUFFIXES:
            try:
                str(content, "utf-8")
            except UnicodeDecodeError:
                return None
        return hashlib.sha256(content).hexdigest()


def _build(
    source: str, files: list[_File], vocabulary: int, folder: Path, tokenizer: Path | None
) -> None:
    """Make the cache folder: aside, then renamed into place, so that nobody sees half of it."""
    fresh = not folder.parent.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="building-", dir=folder.parent) as aside, _quiet():
            built = Path(aside, "built")
            built.mkdir()
            scratch = str(Path(aside, "documents"))
            _encode(source, files, vocabulary, built, tokenizer, scratch=scratch)
            try:
                built.rename(folder)
            except OSError:
                # another process was faster, and its folder is as good
                if not folder.exists():
                    raise
    except ConfigError:
        if fresh:
            with suppress(OSError):
                folder.parent.rmdir()
        raise


def _encode(
    source: str,
    files: list[_File],
    vocabulary: int,
    built: Path,
    given: Path | None,
    *,
    scratch: str,
) -> None:
    train, held_out = _split(_read(source, files, scratch))
    tokenizer = _load(given) if given else _train_tokenizer(train, vocabulary)
    tokenizer.save(str(built / "tokenizer.json"))
    manifest: dict[str, Any] = {"source": source, "files": len(files), "vocabulary": vocabulary}
    for part, documents in (("train", train), ("held_out", held_out)):
        tokens = _write_tokens(documents, tokenizer, built / f"{part}.npy")
        manifest[part] = {"documents": len(documents), "tokens": tokens}
    number_domains(list(held_out["domain"])).save(built / DOMAINS)
    (built / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _read(source: str, files: list[_File], scratch: str) -> Dataset:
    """Every document, with its domain and the name that decides its side: the file's, or the row's
    content."""
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    try:
        return Dataset.from_generator(
            _documents,
            features=Features({name: Value("string") for name in ("name", "domain", "text")}),
            cache_dir=scratch,
            gen_kwargs={"files": files, "scratch": scratch},
        )
    except DatasetGenerationError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(f"data.source {source!r} can't be read: {reason}: {WAY_OUT}") from error


def _documents(files: list[_File], scratch: str) -> Iterator[dict[str, str]]:
    found = False
    for path, name in files:
        rows = path.suffix.lower() in ROW_SUFFIXES
        domain = domain_of(name, rows=rows)
        if not rows:
            found = True
            yield {"name": name, "domain": domain, "text": path.read_bytes().decode()}
            continue
        for text in _rows(path, scratch):
            found = True
            digest = hashlib.sha256(text.encode()).hexdigest()
            yield {"name": digest, "domain": domain, "text": text}
    if not found:
        raise ValueError("no row has a text")


def _rows(path: Path, scratch: str) -> Iterator[str]:
    from datasets import IterableDataset

    # not load_dataset: it reports every call to a server, and waits where there is no network
    read = (
        IterableDataset.from_parquet
        if path.suffix.lower() == ".parquet"
        else IterableDataset.from_json
    )
    for row in read(str(path), cache_dir=scratch):
        if isinstance(row["text"], str) and row["text"]:
            yield row["text"]


def _split(documents: Dataset) -> tuple[Dataset, Dataset]:
    """Training and held-out documents."""
    from datasets import Dataset

    names = list(documents["name"])
    if len(set(names)) >= DOCUMENTS_TO_SPLIT_BY_DOCUMENT:
        is_held_out = np.array(held_out_by_name(names, HELD_OUT_SHARE))
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


def _load(tokenizer: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer))


def _train_tokenizer(documents: Dataset, vocabulary: int) -> Tokenizer:
    """Byte-level BPE (GPT-2's alphabet and splitting), of exactly `vocabulary` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (batch["text"] for batch in _batches(documents, 64))
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ConfigError(
            f"data.vocabulary {vocabulary} > {tokenizer.get_vocab_size()}, the most that the "
            "training documents yield: lower it or give more text"
        )
    return tokenizer


def _write_tokens(documents: Dataset, tokenizer: Tokenizer, path: Path) -> int:
    """Encode the documents into one .npy file; returns the number of tokens."""
    from datasets import Features, List, Value

    dtype = "uint16" if tokenizer.get_vocab_size() <= 1 << 16 else "uint32"
    # a document that quotes the special token doesn't end there
    tokenizer.encode_special_tokens = True

    def encode(batch: Mapping[str, list[str]]) -> dict[str, list]:
        ids = [[*encoding.ids, 0] for encoding in tokenizer.encode_batch_fast(batch["text"])]
        return {"ids": ids, "length": [len(document) for document in ids]}

    encoded = documents.map(
        encode,
        batched=True,
        batch_size=32,
        remove_columns=documents.column_names,
        features=Features({"ids": List(Value(dtype)), "length": Value("int64")}),
        load_from_cache_file=False,
    ).with_format("numpy")
    total = int(sum(batch["length"].sum() for batch in _batches(encoded, 4096)))
    tokens = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(total,))
    end = 0
    for batch in _batches(encoded, 64):
        for ids in batch["ids"]:
            tokens[end : end + len(ids)] = ids
            end += len(ids)
    tokens.flush()
    return total


def _batches(dataset: Dataset, size: int) -> Iterator[dict[str, Any]]:
    return cast("Iterator[dict[str, Any]]", dataset.iter(batch_size=size))


def _bytes_of_token(tokenizer: Path) -> Int64[Tensor, " vocabulary"]:
    """Read from the file: in the byte-level alphabet each character of a token is one byte."""
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = content["model"]["vocab"]
    lengths = torch.zeros(len(vocabulary), dtype=torch.int64)
    for token, token_id in vocabulary.items():
        lengths[token_id] = len(token)
    for special in content["added_tokens"]:
        lengths[special["id"]] = 0
    return lengths


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
