"""Hashes by which files are known to be as they were written."""

from __future__ import annotations

import hashlib
from pathlib import Path

BLOCK = 2**20
"""Bytes that are read at a time."""


def file_sha256(path: Path) -> str:
    """Of the file's content."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()
