"""Hashes by which files are known to be as they were written."""

from __future__ import annotations

import hashlib
from pathlib import Path

BLOCK = 2**20
"""Bytes that are read at a time."""


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's content."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def digest_of_both(train: str, held_out: str) -> str:
    """Differs when the digest of either side of a data set does."""
    return hashlib.blake2b(f"{train} {held_out}".encode(), digest_size=16).hexdigest()
