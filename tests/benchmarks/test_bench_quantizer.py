"""The benchmark measures every contestant, at a size that takes no time."""

from __future__ import annotations

import pytest

from simvq_moe.benchmarks.quantizer import PRODUCT, bench_quantizer, table


@pytest.fixture(scope="module")
def results() -> dict[str, float]:
    found = bench_quantizer([(64, 512, 8)], rounds=1)
    assert table(found).count("\n") == len(found) + 1
    assert all(r.seconds > 0 for r in found)
    assert all(r.megabytes is None or r.megabytes > 0 for r in found)
    return {r.name: r.relative for r in found}


def test_every_contestant_is_compared_with_the_bare_product(results: dict[str, float]) -> None:
    assert results[PRODUCT] == 1
    assert {"simvq-moe SimVQ", "plain published formula"} < set(results)


def test_the_step_needs_no_distance_matrix() -> None:
    found = {r.name: r.megabytes for r in bench_quantizer([(2048, 16384, 8)], rounds=0)}
    ours, plain = found["simvq-moe SimVQ"], found["plain published formula"]
    assert ours is not None
    assert plain is not None
    assert ours < 24
    assert plain > 4 * 2048 * 16384 / 1e6
