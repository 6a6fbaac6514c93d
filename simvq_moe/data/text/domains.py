"""Domains of a text corpus: which part of its source a token's document comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int, Int64, Integer

from simvq_moe.files.arrays import Layout, read_arrays
from simvq_moe.files.regular import BrokenFileError, printable


@dataclass(frozen=True)
class Domains:
    """The domain of every document in a row of tokens."""

    names: tuple[str, ...]
    of_document: Int64[np.ndarray, " documents"]
    """Numbers of `names`, in the order of the documents."""
    end_of_text: int = 0
    """The token that ends a document and belongs to it."""

    def of_tokens(
        self, tokens: Integer[np.ndarray, " tokens"], positions: Int[np.ndarray, "*some"]
    ) -> Int64[np.ndarray, "*some"]:
        """Domains of the tokens at these positions."""
        ends = np.flatnonzero(tokens == self.end_of_text)
        return self.of_document[np.searchsorted(ends, positions)]

    def save(self, path: Path) -> None:
        np.savez(
            path,
            names=np.array(self.names),
            of_document=self.of_document,
            end_of_text=np.int64(self.end_of_text),
        )


LAYOUTS = {
    "names": Layout("U", 1),
    "of_document": Layout("iu", 1),
    # caches of before other tokenizers could be given have no such entry
    "end_of_text": Layout("iu", 0, optional=True),
}
"""Layouts of the arrays that `Domains.save` writes."""


def load_domains(path: Path) -> Domains:
    """What `Domains.save` has written.

    Raises:
        BrokenFileError: it is no such file, or a document has a domain without a name.
    """
    saved = read_arrays(path, LAYOUTS)
    names, of_document = saved["names"], saved["of_document"].astype(np.int64)
    if len(of_document) and not 0 <= of_document.min() <= of_document.max() < len(names):
        raise BrokenFileError(path, f"has documents of other domains than its {len(names)}")
    return Domains(tuple(names.tolist()), of_document, int(saved.get("end_of_text", 0)))


def number_domains(names: list[str], end_of_text: int = 0) -> Domains:
    """The domains of documents, from the name of each document's domain."""
    distinct, of_document = np.unique(np.array(names), return_inverse=True)
    return Domains(tuple(distinct.tolist()), of_document.astype(np.int64), end_of_text)


def domain_of(name: str, *, rows: bool) -> str:
    """Domain of a file's documents, from its path inside the source.

    The top folder ("asyncio" for asyncio/events.py); outside of all folders a document is of its
    type's domain (".py"), and rows are of their file's ("wiki" for wiki.jsonl).
    """
    path = PurePosixPath(printable(name))
    if len(path.parts) > 1:
        return path.parts[0]
    return path.stem if rows else path.suffix.lower()
