"""Screening never rules out the group of the nearest code, whatever the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simvq_moe.core.search import nearest as search
from simvq_moe.core.search import screening
from simvq_moe.core.search.nearest import Codes, nearest
from simvq_moe.core.search.screening import GROUP, groups_that_may_win

KINDS = ["gaussian", "clustered", "near ties", "shifted", "long and short", "tiny", "integers"]


def data(kind: str, tokens: int, codes: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z, e = torch.randn(tokens, width, generator=g), torch.randn(codes, width, generator=g)
    if kind == "clustered":
        centres = 3 * torch.randn(3, width, generator=g)
        e = centres[torch.randint(3, (codes,), generator=g)] + 1e-3 * e
        z = centres[torch.randint(3, (tokens,), generator=g)] + 1e-2 * z
    if kind == "near ties":
        e = e[:1] + 1e-6 * e
    if kind == "shifted":
        z, e = z + 50, e + 50
    if kind == "long and short":
        e = e * torch.logspace(-6, 6, codes)[torch.randperm(codes, generator=g), None]
    if kind == "tiny":
        z, e = z * 1e-19, e * 1e-19
    if kind == "integers":
        z, e = (2 * z).round(), (2 * e).round()
    return z, e


@pytest.fixture
def screened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes also for small searches and on processors that multiply bfloat16 slowly."""
    monkeypatch.setattr(screening, "SCREEN_FROM_TOKENS", 0)
    monkeypatch.setattr(screening, "SCREEN_FROM_CODES", 0)
    monkeypatch.setattr(screening, "_has_fast_bfloat16", lambda: True)


problems = given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 40),
    codes=st.integers(1, 2100),
    width=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)


@settings(deadline=None)
@problems
def test_the_group_of_the_nearest_code_is_kept(
    kind: str, tokens: int, codes: int, width: int, seed: int
) -> None:
    z, e = data(kind, tokens, codes, width, seed)
    keep = groups_that_may_win(z, Codes(e, None, None, torch.float32))
    assert keep.shape == (-(-codes // GROUP), tokens)
    scores = z.double() @ e.double().T - e.double().square().sum(1) / 2
    exact = scores.argmax(1)
    single = (z @ e.T - e.square().sum(1) / 2).argmax(1)
    for ids in (exact, single):
        assert bool(keep[ids // GROUP, torch.arange(tokens)].all())


def aligned(near: float, width: int, gap: float = 2.0**-12) -> tuple[Tensor, Tensor]:
    """Latents +-x s and two groups of equal codes, -near s and a slightly better one beyond x s.

    s is a vector of signs, so that every channel of a latent and of a code is rounded by the same
    amount and Cauchy-Schwarz holds with equality. x lies halfway between two bfloat16 numbers and
    rounds down as the better code does, whose score therefore loses all that the bound allows.
    """
    s = torch.randint(2, (width,), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    x = 1 + 2.0**-8
    far = (2 * x + near) * (1 - gap)
    z = torch.stack([x * s, -x * s]).repeat(20, 1)
    return z, torch.cat([(-near * s).repeat(GROUP, 1), (far * s).repeat(GROUP, 1)])


def shifted(width: int) -> tuple[Tensor, Tensor]:
    """Far from the origin float32 rounds scores by more than codes differ."""
    g = torch.Generator().manual_seed(0)
    z, e = torch.randn(40, width, generator=g), torch.randn(600, width, generator=g)
    return z + 1000, e + 1000


def loses(z: Tensor, e: Tensor) -> bool:
    """Whether a token misses the group of its nearest code, the exact one or the float32 one."""
    keep = groups_that_may_win(z, Codes(e, None, None, torch.float32))
    exact = z.double() @ e.double().T - e.double().square().sum(1) / 2
    single = z @ e.T - e.square().sum(1) / 2
    tokens = torch.arange(len(z))
    return not all(bool(keep[x.argmax(1) // GROUP, tokens].all()) for x in (exact, single))


NEAR = [0.0, 2.0**-6, 0.25, 0.26, 0.5]


@pytest.mark.parametrize("near", NEAR)
@pytest.mark.parametrize("width", [4, 16, 64, 256])
def test_no_code_is_lost_where_all_rounding_errors_align(near: float, width: int) -> None:
    z, e = aligned(near, width)
    assert not loses(z, e)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "is_worth_screening", lambda *_: True)
        assert torch.equal(nearest(z, e), torch.tensor([GROUP, 0]).repeat(20))


@pytest.mark.parametrize(("factor", "cases"), [(0.9, NEAR[:2]), (0.7, NEAR)])
def test_a_smaller_bound_would_lose_codes(
    factor: float, cases: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test before this one notices a bound that is too small."""
    whole = screening._rounding_bound
    monkeypatch.setattr(screening, "_rounding_bound", lambda *terms: factor * whole(*terms))
    assert all(loses(*aligned(near, width)) for near in cases for width in (16, 64))


def halfway() -> tuple[Tensor, Tensor]:
    """Latents +-4 and two groups of codes at 1.125, the second a little beyond, so it is nearer.

    The first group scores 495 / 128, halfway between two bfloat16 numbers, and is rounded up to the
    even one. bfloat16 takes the second code for the first while its half norm is the larger one it
    has: its score is rounded down, and all terms of the bound but the one for that are smaller.
    """
    e = torch.tensor([1.125, 1.125 + 2.0**-12]).repeat_interleave(GROUP)[:, None]
    return torch.tensor([[4.0], [-4.0]]), e


def tiny(scale: float) -> tuple[Tensor, Tensor]:
    z, e = data("gaussian", 40, 600, 8, seed=0)
    return scale * z, scale * e


@pytest.mark.parametrize(
    ("unit", "cases"),
    [
        ("U", [halfway()]),
        ("V", [shifted(32)]),
        # processors that flush such products to zero lose codes at the first scale, and others,
        # whose least bfloat16 number is 2^-133 = 1e-40, at the second
        ("TINY", [tiny(1e-19), tiny(1e-20)]),
    ],
)
def test_no_unit_of_rounding_can_be_left_out(
    unit: str, cases: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(loses(*case) for case in cases)
    monkeypatch.setattr(screening, unit, 0.0)
    assert any(loses(*case) for case in cases)


@settings(deadline=None)
@problems
def test_ids_of_two_passes_are_those_of_one_up_to_float32_rounding(
    kind: str, tokens: int, codes: int, width: int, seed: int
) -> None:
    z, e = data(kind, tokens, codes, width, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "is_worth_screening", lambda *_: True)
        two = nearest(z, e)
        patch.setattr(search, "is_worth_screening", lambda *_: False)
        one = nearest(z, e)
    if kind == "integers":  # every product and sum is exact, ties are ties
        assert torch.equal(two, one)
    score = z.double() @ e.double().T - e.double().square().sum(1) / 2
    lengths = (
        z.double().norm(dim=1) * e.double().norm(dim=1).max() + e.double().square().sum(1).max()
    )
    rounding = 2 * (width + 4) * 2.0**-24 * lengths
    best = score.amax(1)
    for ids in (one, two):
        assert bool((score.gather(1, ids[:, None]).squeeze(1) >= best - rounding).all())


@pytest.mark.usefixtures("screened")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["latents", "codebook"])
def test_input_that_is_not_finite_is_an_error_in_two_passes_too(value: float, where: str) -> None:
    z, book = torch.randn(5, 4), torch.randn(3000, 4)
    (z if where == "latents" else book)[-1, 0] = value
    with pytest.raises(ValueError, match="1 of 5 latents" if where == "latents" else "codebook is"):
        nearest(z, book)


@pytest.mark.usefixtures("screened")
def test_a_map_and_a_bias_are_searched_as_their_rows() -> None:
    torch.manual_seed(0)
    z, q, W, b = torch.randn(300, 6), torch.randn(3000, 4), torch.randn(4, 6), torch.randn(6)
    assert torch.equal(nearest(z, q, W=W, bias=b), nearest(z, q @ W + b))
    q = torch.randn(3000, 6)
    assert torch.equal(nearest(z, q, W=W[0]), nearest(z, q * W[0]))


@pytest.mark.usefixtures("screened")
def test_most_groups_are_ruled_out_where_latents_lie_near_their_codes() -> None:
    torch.manual_seed(0)
    e = torch.randn(8192, 16) + 20
    z = e[torch.randperm(8192)[:500]] + 0.01 * torch.randn(500, 16)
    keep = groups_that_may_win(z, Codes(e, None, None, torch.float32))
    assert float(keep.float().mean()) < 2 * GROUP / 8192


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_a_lower_matmul_precision_elsewhere_does_not_change_ids(precision: str) -> None:
    torch.manual_seed(0)
    z, e = torch.randn(64, 32), torch.randn(2000, 32)
    expected = nearest(z, e)
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(nearest(z, e), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_memory_does_not_hold_a_tokens_by_codes_matrix() -> None:
    z, e = torch.randn(2048, 8), torch.randn(32768, 8)
    nearest(z, e)
    with torch.profiler.profile(profile_memory=True) as profile:
        nearest(z, e)
    alive, peak = 0, 0
    results: Any = profile.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert 0 < peak < 32e6 < 4 * 2048 * 32768
