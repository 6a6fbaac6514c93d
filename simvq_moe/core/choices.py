"""Options that are one of a few words."""

from __future__ import annotations

from typing import Any, get_args


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ValueError unless the value of an option is among those of a `Literal`."""
    if value not in get_args(choices):
        raise ValueError(
            f"{name} {value!r}: choose one of {', '.join(map(repr, get_args(choices)))}"
        )
