"""Token windows of documents that are read, shuffled, encoded and packed while training.

A global batch has as many lanes as samples. A lane reads its own documents of every source,
shuffles them block by block, draws the source of the next document, and packs what it draws into
windows; it depends on seed and number alone. Ranks share the lanes, so global batches are the same
on any number of ranks, and the positions of all lanes are the whole state of the stream.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int64

from simvq_moe.data.order import Share, StepBatches, place_of
from simvq_moe.data.rows.base import TEXT_FIELD, CorruptDataError, Defect
from simvq_moe.data.text.cache import build_once
from simvq_moe.data.text.corpora import check_vocabulary, digest_of_tokenizer, write_corpus
from simvq_moe.data.text.documents import Defects, OnCorrupt
from simvq_moe.data.text.sources import Cursor, Document, Source, is_count, open_source
from simvq_moe.data.text.tokenizer import BYTES, load_tokenizer, open_tokenizer, train_tokenizer
from simvq_moe.data.text.tokens import Corpus, encode, load_tokens
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import BrokenFileError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_DOCUMENTS = 10_000
"""Training documents of each source, at most, that a tokenizer is trained on."""
LAYOUT = "1"
"""Names the way in which held-out documents are taken."""


def text_stream(
    sources: Sequence[str],
    *,
    weights: Sequence[float],
    held_out_share: float,
    held_out_documents: int,
    shuffle_buffer: int,
    seed: int,
    vocabulary: int,
    context: int,
    cache_dir: str,
    tokenizer: str | None,
    on_corrupt: OnCorrupt,
    text_field: str = TEXT_FIELD,
) -> tuple[TextStream, Corpus]:
    """A stream of training windows, and the corpus of its held-out documents.

    The first held-out documents of each source, and without a tokenizer the training documents met
    on the way to them, are read once and kept in the cache. It is named by the names and sizes of
    files, for their content is too large to be read beforehand.

    Args:
        sources: folders, files, or names on the hub; see `config.DataConfig` for the rest.

    Raises:
        ConfigError: a source can't be opened, is broken, or has no held-out document.
    """
    check_vocabulary(vocabulary)
    opened = tuple(open_source(source, text_field) for source in sources)
    shares = np.array(weights or [1.0] * len(sources), dtype=np.float64)
    shares /= shares.sum()
    if tokenizer is not None:
        given = load_tokenizer(tokenizer, vocabulary)
    else:
        given = train_tokenizer([], BYTES) if vocabulary == BYTES else None
    settings = [held_out_share, held_out_documents, vocabulary, digest_of_tokenizer(given)]
    settings += [] if text_field == TEXT_FIELD else [text_field]
    key = json.dumps([LAYOUT, [s.digest for s in opened], shares.tolist(), *settings])
    folder = Path(cache_dir) / f"stream-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def fill(built: Path, scratch: Path) -> None:
        del scratch
        numbers = np.maximum(1, np.round(shares * held_out_documents)).astype(int)
        first = [
            _first_documents(source, number, held_out_share, Defects(on_corrupt))
            for source, number in zip(opened, numbers.tolist(), strict=True)
        ]
        _write_held_out(built, first, given, vocabulary, {"sources": list(sources)})

    try:
        build_once(folder, fill, f"taking held-out documents of {', '.join(sources)}")
    except CorruptDataError as error:
        raise ConfigError(str(error)) from None
    corpus = load_tokens(
        folder, parts=("held_out",), source=sources[0], vocabulary=vocabulary, context=context
    )
    stream = TextStream(
        sources=opened,
        shares=tuple(shares.tolist()),
        tokenizer=corpus.tokenizer,
        end_of_text=corpus.end_of_text,
        context=context,
        seed=seed,
        shuffle_buffer=shuffle_buffer,
        held_out_share=held_out_share,
        on_corrupt=on_corrupt,
    )
    return stream, replace(corpus, digest=folder.name)


@dataclass(frozen=True)
class TextStream:
    """Endless training windows; epochs of a lane follow one another, each in an order of its own.

    Documents are drawn with the sources' shares; a window holds the next context + 1 tokens of
    what its lane has drawn, and overlaps the one before by a token.
    """

    sources: tuple[Source, ...]
    shares: tuple[float, ...]
    tokenizer: Path
    end_of_text: int
    context: int
    seed: int
    shuffle_buffer: int
    held_out_share: float
    on_corrupt: OnCorrupt

    def batches(self, share: Share, position: Mapping[int, Any]) -> Iterator[StepBatches]:
        """What a rank reads, endlessly.

        Args:
            position: of the lanes, as a `StepBatches` has it; a lane that it lacks starts.

        Raises:
            CorruptDataError: a file or row is broken and not to be skipped, a lane is empty, or the
                position is none of these sources.
        """
        try:
            tokenizer = open_tokenizer(self.tokenizer)
        except BrokenFileError as error:
            raise CorruptDataError(str(error)) from None
        defects = Defects(self.on_corrupt)
        parts = share.of(np.arange(share.batch)).tolist()
        lanes = {
            number: Lane(self, number, share.batch, tokenizer, defects, position.get(number))
            for part in parts
            for number in part
        }
        while True:
            windows = [np.stack([lanes[number].window() for number in part]) for part in parts]
            states = {number: lane.state() for number, lane in lanes.items()}
            yield StepBatches([torch.from_numpy(window) for window in windows], states)


class Lane:
    """The windows of one sample of every batch."""

    def __init__(
        self,
        stream: TextStream,
        number: int,
        lanes: int,
        tokenizer: Tokenizer,
        defects: Defects,
        state: Any,
    ) -> None:
        self.stream, self.number, self.tokenizer = stream, number, tokenizer
        if state is not None and not _is_of_lane(state, stream):
            raise _foreign(number)
        self.drawn: int = state["drawn"] if state else 0
        self.left = state["left"].cpu().numpy() if state else np.zeros(0, dtype=np.int32)
        self.sources = [
            Shuffled(stream, source, number, lanes, defects, state["sources"][i] if state else None)
            for i, source in enumerate(stream.sources)
        ]
        self.bounds = np.cumsum(stream.shares)[:-1]

    def window(self) -> Int64[np.ndarray, " window"]:
        """The next context + 1 tokens."""
        context, pieces = self.stream.context, [self.left]
        missing = context + 1 - len(self.left)
        while missing > 0:
            (ids,) = encode(self.tokenizer, [self._draw()], self.stream.end_of_text)
            pieces.append(np.array(ids, dtype=np.int32))
            missing -= len(ids)
        tokens = np.concatenate(pieces) if len(pieces) > 1 else self.left
        self.left = tokens[context:]
        return tokens[: context + 1].astype(np.int64)

    def state(self) -> dict[str, Any]:
        """Where to go on; nothing in it changes later."""
        return {
            "drawn": self.drawn,
            "left": torch.from_numpy(self.left),
            "sources": [source.state() for source in self.sources],
        }

    def _draw(self) -> str:
        """The next document of a source that is drawn by seed, lane and number alone."""
        place = 0.0
        if len(self.sources) > 1:
            place = np.random.default_rng([self.stream.seed, self.number, self.drawn]).random()
        self.drawn += 1
        return self.sources[int(np.searchsorted(self.bounds, place, side="right"))].draw()


class Shuffled:
    """A lane's training documents of one source, endlessly, shuffled within blocks.

    While a block is used up the next one is read, a document for a document. The state is where the
    block in use starts and how many of its documents were taken.
    """

    def __init__(
        self,
        stream: TextStream,
        source: Source,
        lane: int,
        lanes: int,
        defects: Defects,
        state: Mapping[str, Any] | None,
    ) -> None:
        self.stream, self.source, self.lane, self.lanes = stream, source, lane, lanes
        self.defects = defects
        start = state or {"epoch": 0, "number": 0, "position": None, "taken": 0}
        self.next_start = {name: start[name] for name in ("epoch", "number", "position")}
        self._open()
        self._turn()
        self.taken: int = start["taken"]
        if self.taken > len(self.block):
            raise _foreign(lane)

    def draw(self) -> str:
        """The next document."""
        while self.taken == len(self.block):
            self._turn()
        self._read_another()
        self.taken += 1
        return self.block[self.taken - 1]

    def state(self) -> dict[str, Any]:
        """Where to go on; nothing in it changes later."""
        return self.start | {"taken": self.taken}

    def _open(self) -> None:
        """Start to read the next block, in an epoch that is new or was left off."""
        start = self.next_start
        seed = (self.stream.seed, start["epoch"])
        self.cursor: Cursor = self.source.cursor(self.lane, self.lanes, seed, start["position"])
        self.documents = self._training_documents(self.cursor)
        self.coming: list[str] = []
        self.ended = False

    def _turn(self) -> None:
        """Use the block that was read ahead, in a random order, and begin to read the next one."""
        while self._read_another():
            pass
        self.start, ended = self.next_start, self.ended
        epoch, number = self.start["epoch"], self.start["number"]
        if ended and not number and not self.coming:
            raise CorruptDataError(
                f"data.source {self.source.name!r} has no training document for sample {self.lane} "
                f"of a batch of {self.lanes}: lower train.batch_size, or set data.streaming to "
                "False"
            )
        random = np.random.default_rng([self.stream.seed, self.lane, epoch, number])
        self.block = [self.coming[i] for i in random.permutation(len(self.coming))]
        self.taken = 0
        if ended:
            self.next_start = {"epoch": epoch + 1, "number": 0, "position": None}
            self._open()
        else:
            position = self.cursor.position
            self.next_start = {"epoch": epoch, "number": number + 1, "position": position}
            self.coming = []

    def _read_another(self) -> bool:
        """Read one more document of the next block; False: it is complete."""
        if self.ended or len(self.coming) == self.stream.shuffle_buffer:
            return False
        text = next(self.documents, None)
        self.ended = text is None
        if text is not None:
            self.coming.append(text)
        return not self.ended

    def _training_documents(self, cursor: Cursor) -> Iterator[str]:
        for document in _readable(cursor, self.defects):
            if place_of(document.name) >= self.stream.held_out_share:
                yield document.text


def _foreign(lane: int) -> CorruptDataError:
    return CorruptDataError(
        f"the checkpoint's position in the data of sample {lane} of a batch is none of these "
        "sources: resume from an earlier checkpoint, or start anew under another train name"
    )


def _is_of_lane(state: Any, stream: TextStream) -> bool:
    """Whether a state has the form and the bounds of what `Lane.state` gives."""
    if not isinstance(state, Mapping) or not is_count(state.get("drawn")):
        return False
    left, sources = state.get("left"), state.get("sources")
    if not isinstance(left, torch.Tensor) or left.ndim != 1 or left.dtype != torch.int32:
        return False
    if not isinstance(sources, list) or len(sources) != len(stream.sources):
        return False
    counts = ("epoch", "number", "taken")
    return all(
        isinstance(one, Mapping)
        and "position" in one
        and all(is_count(one.get(name)) for name in counts)
        for one in sources
    ) and not (len(left) and int(left.min()) < 0)


def _readable(cursor: Cursor, defects: Defects) -> Iterator[Document]:
    for found in cursor:
        if isinstance(found, Defect):
            defects.meet(found)
        else:
            yield found


def _first_documents(
    source: Source, number: int, share: float, defects: Defects
) -> tuple[str, list[Document], list[str]]:
    """Name of the source, its first held-out documents, and texts of training ones before them."""
    held_out: list[Document] = []
    train: list[str] = []
    for document in _readable(source.cursor(0, 1, (0,), None), defects):
        if place_of(document.name) < share:
            held_out.append(document)
            if len(held_out) == number:
                break
        elif len(train) < TOKENIZER_DOCUMENTS:
            train.append(document.text)
    if not held_out:
        raise ConfigError(
            f"data.held_out_share {share}: none of the {len(train)} documents of data.source "
            f"{source.name!r} is held out: raise it, or give more documents"
        )
    return source.name, held_out, train


def _write_held_out(
    built: Path,
    first: list[tuple[str, list[Document], list[str]]],
    given: Tokenizer | None,
    vocabulary: int,
    of_source: dict[str, Any],
) -> None:
    from datasets import Dataset

    if given is None:
        given = train_tokenizer((texts for _, _, texts in first), vocabulary)
    documents = [
        {"domain": document.domain if len(first) == 1 else name, "text": document.text}
        for name, held_out, _ in first
        for document in held_out
    ]
    write_corpus(built, given, {"held_out": Dataset.from_list(documents)}, of_source)
