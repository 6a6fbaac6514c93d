"""The faster of two ways is taken, by shape, and looked for again after a while."""

from __future__ import annotations

from collections.abc import Callable

from simvq_moe.core.search.faster_way import AGAIN_AFTER, FasterWay


def slow() -> str:
    return "slow"


def fast() -> str:
    return "fast"


def test_the_faster_way_of_each_shape_is_measured_once_and_again_after_a_while() -> None:
    seconds = {slow: 2.0, fast: 1.0}
    measured: list[Callable[[], object]] = []

    def stopwatch(way: Callable[[], object]) -> float:
        measured.append(way)
        return seconds[way]  # pyright: ignore[reportArgumentType]

    faster = FasterWay(stopwatch)
    assert [faster("small", slow, fast) for _ in range(AGAIN_AFTER)] == ["fast"] * AGAIN_AFTER
    assert measured == [slow, fast]
    seconds[fast] = 3.0  # the data have changed
    assert faster("large", slow, fast) == "slow"
    assert faster("small", slow, fast) == "slow"
    assert measured == [slow, fast] * 3
