"""Flags of commands: numbers lie within the ranges of their fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest

from simvq_moe.config.flags import parse_flags
from simvq_moe.config.ranges import Count, Range, Weight
from simvq_moe.errors import ConfigError


@dataclass(frozen=True)
class Flags:
    samples: Count = 2
    limit: Count | None = None
    temperature: Weight | None = None
    port: Annotated[int, Range(0, 65_535)] = 1


def test_numbers_within_their_ranges_are_taken_and_so_is_none() -> None:
    assert parse_flags(Flags, ["--port", "65535", "--limit", "None"], "prog") == Flags(port=65_535)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--samples 0", "--samples 0 < 1: use at least 1"),
        ("--limit 0", "--limit 0 < 1: use at least 1"),
        ("--limit 2147483648", "--limit 2147483648 > 2,147,483,647: use at most that"),
        ("--temperature nan", "--temperature nan < 0: use at least 0"),
        ("--temperature inf", "--temperature inf > 1,000,000.0: use at most that"),
        ("--port 65536", "--port 65536 > 65,535: use at most that"),
    ],
)
def test_a_number_outside_is_one_line_with_the_way_out(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_flags(Flags, flags.split(), "prog")
    assert str(error.value) == message
