"""What each value of a config may be by itself; the bounds of numbers stand beside their fields."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isfinite
from typing import Any

from simvq_moe.config.conversion import shown
from simvq_moe.config.loading import flatten
from simvq_moe.config.ranges import Range, ranges_of
from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError
from simvq_moe.files.of_runs import FOLDERS

LIST = 64
"""Values of a list at most."""

RESERVED = ("report", *FOLDERS)
"""Folders that stand beside runs, or within one."""
PART_BYTES, NAME_BYTES = 200, 1000
"""Bytes that a part of a name has at most, and a name: file systems end at 255 and 4,096."""


def value_problems(config: Config) -> Iterator[str]:
    """Values that are out of range, not finite, empty or unprintable, and names of no folder."""
    ranges = ranges_of(config)
    for key, value in flatten(config).items():
        values = value if isinstance(value, tuple) else (value,)
        if len(values) > LIST:
            yield f"{key} has {len(values)} values: give at most {LIST}"
        for one in values:
            if isinstance(one, str):
                yield from _text_problems(key, one)
            elif key in ranges and one is not None:
                yield from number_problems(key, value, one, ranges[key])
    yield from name_problems("name", config.name)


def number_problems(key: str, value: Any, one: int | float, bounds: Range) -> Iterator[str]:
    """A number out of its range, which is the value of a key or one of its values."""
    if not one >= bounds.least:
        yield f"{key} {shown(value)} < {bounds.least:g}: use at least {bounds.least:g}"
    if one > bounds.most or not isfinite(one):  # in this order: isfinite takes no huge integer
        yield f"{key} {shown(value)} > {bounds.most:,}: use at most that"


def check_text(key: str, text: str) -> None:
    """Raise `ConfigError` for a text that is empty, or has characters that can't be printed, such
    as bytes of a path that are no UTF-8: a file that says it could not be read."""
    for message in _text_problems(key, text):
        raise ConfigError(message)


def _text_problems(key: str, text: str) -> Iterator[str]:
    if not text.strip():
        yield f"{key} {text!r} is empty: give a value, or leave it out"
    if not text.isprintable():
        yield f"{key} {shown(text)} has characters that can't be printed: leave them out"


def name_problems(key: str, name: str, *, parts: int | None = None) -> Iterator[str]:
    """What keeps a name from being a folder of its own below the folder of all runs.

    Args:
        parts: folders within each other at most; None: any number.
    """
    found = name.split("/")
    if not all(re.fullmatch(r"\w[\w.+=-]*", part) for part in found) or not name.isprintable():
        yield (
            f"{key} {shown(name)}: use letters, digits and . _ + = -, a letter, digit or _ first"
            + ("" if parts == 1 else ", with / between folders")
        )
    elif len(found) > (parts or len(found)):
        yield f"{key} {shown(name)} is a folder within another: leave out the /"
    elif max(len(part.encode()) for part in found) > PART_BYTES or len(name.encode()) > NAME_BYTES:
        yield (
            f"{key} {shown(name)} is too long: use at most {PART_BYTES} bytes for a folder, and "
            f"{NAME_BYTES:,} in all"
        )
    elif reserved := [part for part in found if part.lower() in RESERVED]:
        yield f"{key} {shown(name)}: {reserved[0]!r} is a folder of records: use another word"
