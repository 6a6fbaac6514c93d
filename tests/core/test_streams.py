"""A part of a tensor is drawn with the numbers that it has in the whole."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simvq_moe.core.streams import CHUNK, GRAIN, normal_part
from tests.live_memory import peak_bytes


@given(
    parts=st.integers(2, 5),
    each=st.integers(1, 5),
    inner=st.lists(st.integers(1, 9), max_size=2),
    grains=st.integers(1, 4),
)
def test_parts_are_those_of_the_whole_and_later_numbers_the_same(
    parts: int, each: int, inner: list[int], grains: int
) -> None:
    shape = (parts * each, *inner)
    torch.manual_seed(7)
    whole, later = torch.empty(shape).normal_(std=0.3), torch.randn(3)
    for i in range(parts):
        torch.manual_seed(7)
        own = normal_part(shape, 0.3, (i, parts), chunk=GRAIN * grains)
        assert torch.equal(own, whole[i * each : (i + 1) * each])
        assert torch.equal(torch.randn(3), later)


@pytest.mark.parametrize("part", [(0, 1), (0, 8), (7, 8)])
def test_there_is_never_more_than_the_part_and_a_chunk(part: tuple[int, int]) -> None:
    shape = (16, 2**10, 2**9)
    torch.manual_seed(7)
    own = 4 * prod(shape) // part[1]
    chunk = 4 * (CHUNK + GRAIN) if part[1] > 1 else 0
    assert peak_bytes(lambda: normal_part(shape, 1.0, part)) < own + chunk + 2**10
