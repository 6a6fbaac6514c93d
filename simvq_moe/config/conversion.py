"""Plain values, as YAML and flags give them, as what a field of a dataclass is annotated with.

Strict, but for one courtesy: a number may be written in any way that says exactly that number, so
that "1e3" is the integer 1000.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

SHOWN = 100
"""Characters of a value that an error shows."""


class WrongValueError(ValueError):
    """A value that is none of a field; says what is meant."""


def converted(kind: Any, value: Any) -> Any:
    """A plain value as a field's type: a number, text, a Literal, a tuple, or one of these or None.

    Raises:
        WrongValueError: it is none.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        (inner,) = (arg for arg in args if arg is not type(None))
        return None if value is None else converted(inner, value)
    if origin is Literal:
        return _choice(args, value)
    if origin is tuple:
        return _tuple(args, value)
    return {int: integer, float: number, bool: _truth, str: _text}[kind](value)


def integer(value: Any) -> int:
    """A whole number, or a text that says one: "1000", "1_000", "1e3"."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        if isinstance(value, str):
            try:
                return int(value)
            except ValueError:
                value = float(value)
        if isinstance(value, float) and value.is_integer():
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise WrongValueError("Integer expected, such as 8 or 1e3")


def number(value: Any) -> float:
    """A number, or a text that says one."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise WrongValueError("number expected, such as 0.1 or 3e-4")


def shown(value: Any) -> str:
    """The value as an error shows it, in one line and not without end."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "of thousands of digits"
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return repr(text) if isinstance(value, str) else text


def _choice(choices: Sequence[Any], value: Any) -> Any:
    for choice in choices:
        try:
            if converted(type(choice), value) == choice:
                return choice
        except WrongValueError:
            continue
    raise WrongValueError(f"use one of {', '.join(map(repr, choices))}")


def _tuple(kinds: Sequence[Any], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise WrongValueError("a list expected, such as [1, 2]")
    if kinds[-1] is ...:
        kinds = [kinds[0]] * len(value)
    if len(kinds) != len(value):
        raise WrongValueError(f"{len(kinds)} values expected, not {len(value)}")
    return tuple(converted(kind, one) for kind, one in zip(kinds, value, strict=True))


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise WrongValueError("true or false expected")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise WrongValueError("text expected: put it in quotes, or give one value if it is a list")
