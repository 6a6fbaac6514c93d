"""What is made ahead is what would have been made."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from simvq_moe.data.prefetch import Prefetched


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_items_come_in_order_whatever_is_made_ahead(ahead: int) -> None:
    found = Prefetched(iter(range(100)), ahead)
    assert [next(found) for _ in range(50)] == list(range(50))
    found.close()


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_comes_where_its_item_would_have(ahead: int) -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("the sixth")

    found = Prefetched(items(), ahead)
    assert [next(found) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="the sixth"):
        next(found)
    found.close()


def test_so_many_items_are_made_before_one_is_asked_for_and_no_more() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for i in range(10):
            made.append(i)
            if i == 2:
                third.set()
            yield i

    found = Prefetched(items(), 3)
    assert third.wait(timeout=30)
    found.close()
    assert made == [0, 1, 2]
