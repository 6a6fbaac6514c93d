"""Running moments, and the map made of them, against numpy in float64; folding; what is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from simvq_moe import MoE
from simvq_moe.core.running_mean import RunningMean
from simvq_moe.core.step_state import after_step
from simvq_moe.core.whitening import (
    DiagonalWhitening,
    FullWhitening,
    LowRankWhitening,
    Whitening,
    build_whitening,
)
from simvq_moe.moe.routers.topk import TopKOptions
from simvq_moe.moe.whitening import ChannelVariances, FullCovariance, LargestDirections

WIDTH = 6


def inputs(steps: int, tokens: int = 200, width: int = WIDTH) -> list[Tensor]:
    """Batches whose mean is far from 0 and drifts, with unequal and correlated channels."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, dtype=torch.float64, generator=generator)
    mixing *= torch.linspace(0.1, 2, width, dtype=torch.float64)
    noise = torch.randn(steps, tokens, width, dtype=torch.float64, generator=generator)
    drift = torch.linspace(3, 4, steps, dtype=torch.float64)[:, None, None]
    return list(noise @ mixing + drift)


def weighted_moments(batches: list[Tensor], weights: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of all tokens, every batch with its weight."""
    whole = np.concatenate([batch.numpy() for batch in batches])
    of = np.concatenate(
        [np.full(len(b), w / len(b)) for b, w in zip(batches, weights, strict=True)]
    )
    of /= of.sum()
    mean = of @ whole
    return mean, (whole - mean).T @ ((whole - mean) * of[:, None])


def run(whitening: Whitening, batches: list[Tensor]) -> None:
    for batch in batches:
        for part in batch.split(70):  # micro-batches
            whitening.collect(part)
        after_step(whitening)


def map_of(whitening: Whitening) -> np.ndarray:
    return whitening.turn(torch.eye(whitening.width, dtype=torch.float64)).numpy()


@pytest.mark.parametrize("kind", ["full", "diagonal", "low_rank"])
def test_steps_that_another_has_written_are_those_that_it_goes_on_from(kind: Any) -> None:
    batches = inputs(14)
    trained, other = (build_whitening(kind, WIDTH, rank=2, every=3) for _ in range(2))
    run(trained, batches[:8])
    with torch.no_grad():  # as DistributedDataParallel does with what rank 0 has loaded
        for mine, theirs in zip(other.buffers(), trained.buffers(), strict=True):
            mine.copy_(theirs)
    assert other.due == trained.due
    for whitening in (trained, other):
        run(whitening, batches[8:])
    assert_close(other.state_dict(), trained.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["full", "diagonal", "low_rank"])
def test_a_step_that_is_not_finite_leaves_no_trace(kind: Any) -> None:
    whitening, mean = build_whitening(kind, WIDTH, rank=2, every=1), RunningMean(WIDTH)
    for batch in inputs(3):
        run(whitening, [batch])
        mean.collect(batch)
        after_step(mean)
    before = copy.deepcopy([whitening.state_dict(), mean.state_dict()])
    bad = inputs(1)[0]
    bad[3, 2] = torch.nan
    run(whitening, [bad])
    mean.collect(bad)
    after_step(mean)
    before[0]["steps"] += 1  # of the optimizer
    assert_close([whitening.state_dict(), mean.state_dict()], before, rtol=0, atol=0)


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 0.5, 1.0])
def test_the_map_is_the_power_of_the_covariance_of_all_steps(exponent: float) -> None:
    whitening, batches = FullWhitening(WIDTH, exponent=exponent, decay=0.9).double(), inputs(5)
    run(whitening, batches)
    mean, covariance = weighted_moments(batches, [0.9**age for age in range(4, -1, -1)])
    np.testing.assert_allclose(whitening.mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(whitening.covariance.numpy(), covariance, rtol=1e-9, atol=1e-12)
    variances, axes = np.linalg.eigh(covariance)
    floored = np.maximum(variances, 0.01 * variances.mean())
    power = axes * floored ** (-exponent / 2) @ axes.T
    after = np.trace(power @ covariance @ power)
    scale = np.sqrt((np.trace(covariance) + mean @ mean) / after)
    np.testing.assert_allclose(map_of(whitening), scale * power, rtol=1e-8, atol=1e-10)


def test_whitened_inputs_are_uncorrelated_and_as_long_as_before() -> None:
    whitening, (batch,) = FullWhitening(WIDTH, floor=1e-9).double(), inputs(1, 5000)
    run(whitening, [batch])
    white = (batch - whitening.mean) @ torch.from_numpy(map_of(whitening))
    covariance = white.T @ white / len(white)
    assert_close(covariance, torch.eye(WIDTH).double() * covariance[0, 0])
    assert_close(white.square().mean(), batch.square().mean())


def test_the_diagonal_one_divides_by_standard_deviations() -> None:
    whitening, batches = DiagonalWhitening(WIDTH, decay=0.5).double(), inputs(3)
    run(whitening, batches)
    _, covariance = weighted_moments(batches, [0.25, 0.5, 1])
    found = map_of(whitening)
    assert_close(torch.from_numpy(found), torch.from_numpy(np.diag(np.diag(found))))
    ratios = np.diag(found) * np.sqrt(
        np.maximum(np.diag(covariance), 0.01 * np.diag(covariance).mean())
    )
    np.testing.assert_allclose(ratios / ratios[0], np.ones(WIDTH), rtol=1e-9)


def test_a_low_rank_map_nears_the_full_one_where_other_directions_vary_alike() -> None:
    width, rank = 20, 4
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q
    scales = torch.tensor([8.0, 6, 4, 3] + [0.5] * (width - rank), dtype=torch.float64)
    batches = [
        torch.randn(4000, width, dtype=torch.float64, generator=generator) * scales @ axes + 1
        for _ in range(30)
    ]
    torch.manual_seed(0)
    options: dict[str, Any] = {"rank": rank, "decay": 0.8, "every": 1}
    full, low = (build_whitening(kind, width, **options).double() for kind in ("full", "low_rank"))
    for whitening in (full, low):
        run(whitening, batches)
    assert isinstance(low, LowRankWhitening)
    assert_close(low.total, (scales.square()).sum(), rtol=0.02, atol=0)  # 4,000 random vectors
    # what is left is the spread of the small variances in the full one
    difference = np.linalg.norm(map_of(low) - map_of(full)) / np.linalg.norm(map_of(full))
    assert difference < 0.03
    identity = np.linalg.norm(
        np.eye(width) * np.linalg.norm(map_of(full)) / width**0.5 - map_of(full)
    )
    assert identity / np.linalg.norm(map_of(full)) > 0.3


@pytest.mark.parametrize("kind", ["full", "diagonal", "low_rank"])
def test_float32_sums_are_exact_enough_far_from_the_origin(kind: Any) -> None:
    batches = [batch + 1000 for batch in inputs(12)]
    torch.manual_seed(0)
    exact = build_whitening(kind, WIDTH, rank=3)
    coarse = copy.deepcopy(exact)
    run(exact, batches)
    run(coarse, [batch.float() for batch in batches])
    # inputs near 1000 are rounded to 6e-5 in float32, of variances from 0.01
    assert_close(map_of(coarse), map_of(exact), rtol=0, atol=2e-3 * np.abs(map_of(exact)).max())


def test_later_steps_count_only_when_they_are_due() -> None:
    whitening, batches = FullWhitening(WIDTH, every=4, decay=0.9).double(), inputs(11)
    maps = []
    for batch in batches:
        run(whitening, [batch])
        maps.append(map_of(whitening))
    changed = [i + 1 for i in range(1, 11) if not np.array_equal(maps[i], maps[i - 1])]
    assert changed == [2, 3, 4, 8]
    counted = [batches[i - 1] for i in (1, 2, 3, 4, 8)]
    mean, covariance = weighted_moments(counted, [0.9**age for age in (7, 6, 5, 4, 0)])
    np.testing.assert_allclose(whitening.mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(whitening.covariance.numpy(), covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "diagonal", "low_rank"])
def test_a_saved_whitening_goes_on_to_the_bit(kind: Any) -> None:
    batches = inputs(9)
    torch.manual_seed(0)
    whole = build_whitening(kind, WIDTH, rank=2, every=3)
    first = copy.deepcopy(whole)
    run(whole, batches)
    run(first, batches[:5])
    second = build_whitening(kind, WIDTH, rank=2, every=3)
    second.load_state_dict(first.state_dict())
    run(second, batches[5:])
    assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert int(whole.steps) == 9


WHITENINGS = {
    "full": FullCovariance(),
    "diagonal": ChannelVariances(),
    "low_rank": LargestDirections(rank=2),
}


@pytest.mark.parametrize("kind", WHITENINGS)
def test_before_the_first_step_nothing_is_changed_and_evaluation_counts_nothing(kind: Any) -> None:
    torch.manual_seed(0)
    plain = MoE(WIDTH, 4, 5, 2)
    torch.manual_seed(0)
    whitened = MoE(WIDTH, 4, 5, 2, router=TopKOptions(whiten=WHITENINGS[kind]))
    x = torch.randn(30, WIDTH)
    assert_close(whitened(x), plain(x))
    whitened.eval()
    assert whitened.router.centre is not None
    whitened.router.centre.pending.zero_()
    whitened(x)
    after_step(whitened)
    assert_close(whitened(x), plain(x))


@pytest.mark.parametrize("kind", ["full", "diagonal", "low_rank"])
def test_inputs_without_spread_or_tokens_give_a_finite_map(kind: Any) -> None:
    torch.manual_seed(0)
    whitening = build_whitening(kind, WIDTH, rank=2)
    for batch in (torch.zeros(3, WIDTH), torch.ones(3, WIDTH), torch.ones(0, WIDTH)):
        run(whitening, [batch])
        assert np.isfinite(map_of(whitening)).all()
        assert np.abs(map_of(whitening)).max() < 1e3


def test_folded_rows_and_biases_give_the_logits_of_float64() -> None:
    torch.manual_seed(0)
    moe = MoE(WIDTH, 4, 5, 2, router=TopKOptions(whiten=FullCovariance()))
    for batch in inputs(4):
        moe(batch.float())
        after_step(moe)
    folded = moe.eval().fold()
    assert {name for name, _ in folded.router.named_parameters()} == {"bank.base", "bias"}
    assert not list(folded.router.buffers())
    x = inputs(1, 500)[0]
    centre = moe.router.centre
    assert isinstance(centre, Whitening)
    rows = moe.router.get_parameter("bank.base").double()
    exact = (x - centre.mean) @ torch.from_numpy(map_of(centre)) @ rows.T
    rows, bias = (folded.router.get_parameter(name).double() for name in ("bank.base", "bias"))
    got = x @ rows.T + bias
    assert_close(got, exact, rtol=1e-5, atol=1e-5)  # of rows that float32 holds
