"""The one rule of what is held out, because training on held-out data makes their measures lie.

The content of an item (a file, a document, a row) decides its side. Equal contents therefore lie on
one side, wherever they lie and whatever they are called, a renamed file stays where it was, and a
set may grow without moving training items to the held-out side.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from io import BufferedReader, BytesIO
from pathlib import Path

from simvq_moe.data.order import held_out_by_name

SHARE = 0.1
"""Share of the different files, documents or speakers that is held out."""
FEWEST = 20
"""Where fewer of them are different, the end of each is held out instead."""
PARTS = ("train", "held_out")
"""Names of the two sides."""
BLOCK = 2**14
"""Bytes of a large file that are read at its start, in its middle and at its end."""


def content_key(content: bytes) -> str:
    """Equal for equal contents alone."""
    return hashlib.sha256(content).hexdigest()


def file_key(path: Path) -> str:
    """Equal for files of equal content, see `stream_key`.

    Raises:
        OSError: the file can't be read now.
    """
    with path.open("rb") as file:
        return stream_key(file)


def stream_key(file: BufferedReader | BytesIO) -> str:
    """Equal for equal contents of files, cheap for large ones.

    A file of more than three blocks is known by its size and three blocks. Where two different
    ones agree in these, they are taken for copies and lie on one side, which does no harm.
    """
    size = file.seek(0, os.SEEK_END)
    found = hashlib.sha256(b"%d\n" % size)
    if size <= 3 * BLOCK:
        file.seek(0)
        found.update(file.read())
    else:
        for place in (0, (size - BLOCK) // 2, size - BLOCK):
            file.seek(place)
            found.update(file.read(BLOCK))
    return found.hexdigest()


def held_out_by_content(
    keys: Sequence[str], share: float, *, names: Sequence[str] | None = None
) -> list[bool]:
    """Which items are held out: about `share` of the different contents, the same on every machine.

    Args:
        keys: of each item's content.
        share: of the contents, from 0 to 1.
        names: of the items of an embedded set, which is the same for everyone. There the first
            name of each content decides, because published numbers were measured so.

    Returns:
        At least one item is on each side, unless all contents are equal: then none is held out.
    """
    if names is not None:
        first: dict[str, str] = {}
        for name, key in sorted(zip(names, keys, strict=True)):
            first.setdefault(key, name)
        keys = [first[key] for key in keys]
    return held_out_by_name(keys, share)
