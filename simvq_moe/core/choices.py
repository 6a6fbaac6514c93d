"""What a constructor refuses: words that are no choice, and what options name as a problem."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ValueError unless the value of an option is among those of a `Literal`."""
    if value not in get_args(choices):
        raise ValueError(
            f"{name} {value!r}: choose one of {', '.join(map(repr, get_args(choices)))}"
        )


def check_none(problems: Iterable[str]) -> None:
    """Raise ValueError with the first of the lines that say what can't run, if there is one."""
    for problem in problems:
        raise ValueError(problem)
