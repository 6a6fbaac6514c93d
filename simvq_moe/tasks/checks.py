"""What several tasks say of their options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def meaningless(section: str, options: Any, names: Sequence[str], beside: str) -> Iterator[str]:
    """A line for each option that is set though it means nothing.

    Args:
        options: of a section of a config, all of which have defaults.
        beside: what takes its meaning, and the way out.
    """
    default = type(options)()
    for name in names:
        if (value := getattr(options, name)) != getattr(default, name):
            yield f"{section}.{name} {value} means nothing {beside}"
