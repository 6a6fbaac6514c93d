"""What numbers of a config may be, as types of its fields.

Upper bounds are far beyond what anyone trains. They keep products of sizes within 64 bits, and a
slip of the keyboard from filling the memory.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from math import nextafter
from typing import Annotated, Any, get_args, get_type_hints

COUNT = 2**31 - 1
"""The largest number of samples, steps and the like."""
CHANNELS = 2**18
SEED = 2**63 - 1
"""The largest seed that every generator takes."""
FACTOR = 1e6
"""The largest weight and the largest multiplier."""
BELOW_1 = nextafter(1, 0)


@dataclass(frozen=True)
class Range:
    """Least and largest value of a number, also of each in a list."""

    least: int | float
    most: int | float


Count = Annotated[int, Range(1, COUNT)]
CountOr0 = Annotated[int, Range(0, COUNT)]
Channels = Annotated[int, Range(1, CHANNELS)]
Seed = Annotated[int, Range(0, SEED)]
Weight = Annotated[float, Range(0, FACTOR)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, BELOW_1)]


def ranges_of(config: Any, prefix: str = "") -> dict[str, Range]:
    """The range of every number of a config by its dotted key."""
    found: dict[str, Range] = {}
    bounds = _ranges(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            found |= ranges_of(value, f"{prefix}{f.name}.")
        elif f.name in bounds:
            found[prefix + f.name] = bounds[f.name]
    return found


@lru_cache
def _ranges(schema: Any) -> dict[str, Range]:
    types = get_type_hints(schema, include_extras=True)
    found = {name: _within(kind) for name, kind in types.items()}
    return {name: one for name, one in found.items() if one is not None}


def _within(kind: Any) -> Range | None:
    """The range that a type has, or its values have where it is a list or may be None."""
    parts = (*getattr(kind, "__metadata__", ()), *get_args(kind))
    own = next((part for part in parts if isinstance(part, Range)), None)
    return own or next((one for one in map(_within, parts) if one is not None), None)
