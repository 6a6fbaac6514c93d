"""What numbers of a config may be, as types of its fields.

Upper bounds are far beyond what anyone trains. They keep products of sizes within 64 bits, and a
slip of the keyboard from filling the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nextafter
from typing import Annotated

COUNT = 2**31 - 1
"""Of samples, steps and the like."""
CHANNELS = 2**18
SEED = 2**63 - 1
"""The largest seed that every generator takes."""
FACTOR = 1e6
"""Of weights and multipliers."""
BELOW_1 = nextafter(1, 0)


@dataclass(frozen=True)
class Range:
    """Least and largest value of a number, also of each in a list."""

    least: float
    most: float


Count = Annotated[int, Range(1, COUNT)]
CountOr0 = Annotated[int, Range(0, COUNT)]
Channels = Annotated[int, Range(1, CHANNELS)]
Seed = Annotated[int, Range(0, SEED)]
Weight = Annotated[float, Range(0, FACTOR)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, BELOW_1)]
