"""The documents of a source that is read as a whole: its files, their content and their texts."""

from __future__ import annotations

import codecs
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from simvq_moe.data.rows.base import BUFFER, CorruptDataError, Defect, Rows, UnreachableError
from simvq_moe.data.text.documents import (
    WAY_OUT,
    Defects,
    File,
    OnCorrupt,
    content_name,
    first_defect,
    list_files,
    nothing_readable,
    read_rows,
)
from simvq_moe.data.text.domains import domain_of
from simvq_moe.files.regular import printable

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("key", "name", "domain", "text")
ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 1024, 2**24
"""Documents that wait in memory until they are written, or one more than so long together."""

log = logging.getLogger(__name__)


class Scanned(NamedTuple):
    """A source whose files were looked through."""

    source: str
    files: list[File]
    """The readable ones."""
    digest: str
    """Of their names and contents."""


@dataclass(frozen=True)
class Reading:
    """How the files of a source are read."""

    field: str
    """Column or field of rows with the document."""
    on_corrupt: OnCorrupt

    def scan(self, source: str) -> Scanned:
        """The readable files of a source; the others are named in the log."""
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
        return Scanned(source, readable, digest.hexdigest())

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
