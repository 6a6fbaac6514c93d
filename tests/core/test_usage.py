"""Usage measures against their definitions, for permutation invariance and at their null."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from simvq_moe.core.running_mean import RunningMean
from simvq_moe.core.usage import UsageCounter, counters, counting, null_usage, usage
from tests.models.tracing import of_tracing

COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any)


def brute_force(counts: list[int]) -> dict[str, float]:
    """Each measure as metrics are defined on paper, slot by slot."""
    slots, total = len(counts), sum(counts)
    f = [n / total for n in counts]
    H = -sum(x * math.log(x) for x in f if x > 0)
    mean = total / slots
    return {
        "used": sum(n > 0 for n in counts) / slots,
        "dead": sum(n == 0 for n in counts) / slots,
        "starved": sum(x < 0.1 / slots for x in f) / slots,
        "perplexity": math.exp(H),
        "relative_perplexity": math.exp(H) / slots,
        "entropy": H / math.log(slots) if slots > 1 else 1.0,
        "max_load": slots * max(f),
        "max_vio": max(counts) / mean - 1,
        "min_vio": 1 - min(counts) / mean,
        "cv": math.sqrt(sum((n - mean) ** 2 for n in counts) / slots) / mean,
        "gini": sum(abs(a - b) for a in f for b in f) / (2 * slots),
    }


@given(COUNTS)
def test_measures_equal_brute_force(counts: list[int]) -> None:
    assert usage(torch.tensor(counts)).as_dict() == pytest.approx(brute_force(counts), abs=1e-12)


@given(COUNTS, st.randoms(use_true_random=False))
def test_measures_do_not_depend_on_the_order_of_slots(counts: list[int], random: object) -> None:
    shuffled = list(counts)
    random.shuffle(shuffled)  # pyright: ignore[reportAttributeAccessIssue]
    assert usage(np.array(counts)).as_dict() == pytest.approx(
        usage(np.array(shuffled)).as_dict(), abs=1e-12
    )


@given(COUNTS, st.integers(1, 1000))
def test_measures_do_not_depend_on_the_size_of_the_window(counts: list[int], times: int) -> None:
    n = np.array(counts)
    assert usage(n).as_dict() == pytest.approx(usage(n * times).as_dict(), abs=1e-12)


@pytest.mark.parametrize("slots", [2, 7, 64])
def test_even_and_collapsed_counts_reach_the_ends_of_every_scale(slots: int) -> None:
    even = usage(np.full(slots, 3))
    assert even.used == 1
    assert even.perplexity == pytest.approx(slots)
    assert [even.relative_perplexity, even.entropy, even.max_load] == pytest.approx([1, 1, 1])
    assert [even.max_vio, even.min_vio, even.cv, even.gini] == pytest.approx([0] * 4, abs=1e-12)
    one = usage(np.eye(slots, dtype=np.int64)[1] * 9)
    assert one.perplexity == 1
    assert one.max_load == slots
    assert one.max_vio == slots - 1
    assert one.min_vio == 1
    assert one.gini == pytest.approx(1 - 1 / slots)


def test_the_null_is_what_chance_scores() -> None:
    null = null_usage(4096, 4 * 4096)
    assert null.dead == pytest.approx(math.exp(-4), rel=0.03)
    assert null.cv == pytest.approx(4**-0.5, rel=0.02)
    assert null_usage(65536, 65536).dead == pytest.approx(0.368, abs=2e-3)
    assert null_usage(65536, 65536).gini == pytest.approx(0.52, abs=5e-3)
    many = null_usage(512, 512 * 400)
    # gini's null is a limit for many draws a slot
    assert many.gini == pytest.approx((math.pi * 400) ** -0.5, rel=0.05)


@pytest.mark.parametrize("counts", [[], [0, 0], [1, -1], [[1, 2]]])
def test_counts_without_a_draw_have_no_usage(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one > 0"):
        usage(np.array(counts))


def test_a_counter_sums_ids_of_any_shape_and_starts_a_new_window_when_taken() -> None:
    counter = UsageCounter(4, kind="codes")
    counter.add(torch.tensor([[0, 3], [3, 3]]))
    counter.add(torch.zeros(0, dtype=torch.int64))
    counter.add(torch.tensor(1))
    assert counter.take().tolist() == [1, 1, 0, 3]
    assert counter.take().tolist() == [0, 0, 0, 0]
    assert counter.counts.dtype == torch.int64
    assert counter.state_dict() == {}


def test_evaluation_counts_only_on_request_and_leaves_the_training_window() -> None:
    model = nn.ModuleList([UsageCounter(2, kind="codes"), UsageCounter(3, kind="experts")])
    first = counters(model)[0]
    first.add(torch.tensor([0]))
    model.eval()
    first.add(torch.tensor([1]))
    assert first.counts.tolist() == [1, 0]
    with counting(model) as found:
        found[0].add(torch.tensor([1, 1]))
        assert found[0].counts.tolist() == [0, 2]
    assert first.counts.tolist() == [1, 0]


def test_recomputed_activations_are_not_counted_twice() -> None:
    counter = UsageCounter(3, kind="experts")

    def layer(x: torch.Tensor) -> torch.Tensor:
        counter.add(torch.tensor([0, 2]))
        return x.sin()

    y = checkpoint(layer, torch.ones(2, requires_grad=True), use_reentrant=False)
    assert isinstance(y, torch.Tensor)
    y.sum().backward()
    assert counter.take().tolist() == [1, 0, 1]


@of_tracing
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.usefixtures("unchecked")
def test_compiled_activations_are_not_counted_twice_either(inside: bool, reentrant: bool) -> None:
    if inside and reentrant:
        pytest.skip("torch does not compile it")
    counter, mean = UsageCounter(3, kind="experts"), RunningMean(2)

    def layer(x: torch.Tensor) -> torch.Tensor:
        counter.add(torch.tensor([0, 2]))
        mean.collect(x.detach())
        return x.sin()

    def checkpointed(x: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        y = checkpoint(run, x, use_reentrant=reentrant)
        assert isinstance(y, torch.Tensor)
        return y

    torch.compiler.reset()
    compiled: Any = torch.compile(layer, backend="aot_eager")
    whole: Any = torch.compile(lambda x: checkpointed(x, layer), backend="aot_eager")
    for _ in range(2):
        x = torch.ones(5, 2, requires_grad=True)
        (whole(x) if inside else checkpointed(x, compiled)).sum().backward()
    assert counter.take().tolist() == [2, 0, 2]
    assert mean.pending.tolist() == [10, 10, 10]
