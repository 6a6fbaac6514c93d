"""Soft assignment without a temperature: 1/d^2 over the nearest few, and no unit of length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from simvq_moe import EMAVQ, FSQ, LFQ, VQ, SimVQ
from simvq_moe.core.search.nearest import nearest_few
from simvq_moe.quantizers import BSQ, IBQ, MLPVQ, PADDING, CosineVQ, GroupVQ, Quantizer

QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "vq": lambda: VQ(40, 3),
    "vq restart": lambda: VQ(40, 3, restart=0.5),
    "ema": lambda: EMAVQ(40, 3),
    "cosine": lambda: CosineVQ(40, 3),
    "simvq": lambda: SimVQ(40, 3, bias=True),
    "group": lambda: GroupVQ(40, 3, groups=4),
    "mlp": lambda: MLPVQ(40, 3),
    "fsq": lambda: FSQ([4, 5, 3]),
    "lfq": lambda: LFQ(5),
    "bsq": lambda: BSQ(5),
}


def naive(z: Tensor, book: Tensor, few: int) -> tuple[Tensor, Tensor]:
    """All distances, sorted, one latent at a time."""
    ids, weights = [], []
    for latent in z:
        square = (latent - book).square().sum(1)
        nearest = square.argsort(stable=True)[:few]
        inverse = 1 / square[nearest]
        ids.append(nearest)
        weights.append(inverse / inverse.sum())
    return torch.stack(ids), torch.stack(weights)


@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_weights_are_inverse_squared_distances_to_the_nearest_few(name: str) -> None:
    torch.manual_seed(0)
    quantizer = QUANTIZERS[name]().double()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    z = torch.randn(2, 7, quantizer.width, dtype=torch.float64)
    ids, weights = quantizer.soft_assign(z, 5)
    rows = quantizer.prepare(z.flatten(0, 1)).detach()
    book = quantizer.codebook(torch.float64).detach()
    expected = naive(rows, book, 5)
    assert_close((ids.flatten(0, 1), weights.flatten(0, 1)), expected)
    assert torch.equal(ids[..., 0], quantizer.encode(z))
    assert_close(weights.sum(-1), torch.ones(2, 7).double())


@settings(deadline=None)
@given(
    tokens=st.integers(0, 5),
    codes=st.integers(2, 2100),
    width=st.integers(1, 5),
    few=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_the_nearest_few_are_those_of_all_distances(
    tokens: int, codes: int, width: int, few: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, width, generator=g, dtype=torch.float64)
    book = torch.randn(codes, width, generator=g, dtype=torch.float64)
    few = min(few, codes)
    ids, square = nearest_few(z, book, few)
    everything = (z[:, None] - book).square().sum(-1).sort(stable=True)
    assert torch.equal(ids, everything.indices[:, :few])
    assert_close(square, everything.values[:, :few])


@pytest.mark.parametrize("scale", [2.0**-30, 0.5, 2.0**30])
def test_scaling_latents_and_codes_together_changes_nothing(scale: float) -> None:
    torch.manual_seed(0)
    quantizer, z = VQ(40, 3), torch.randn(9, 3)
    before = quantizer.soft_assign(z, 4)
    quantizer.bank.base.data *= scale
    after = quantizer.soft_assign(z * scale, 4)
    assert torch.equal(before.ids, after.ids)
    assert torch.equal(before.weights, after.weights)


def test_a_latent_on_a_code_is_its_alone_and_equal_codes_share() -> None:
    quantizer = VQ(4, 2)
    quantizer.bank.base.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 3.0], [1.0, 0.0]])
    ids, weights = quantizer.soft_assign(torch.tensor([[3.0, 3.0], [1.0, 0.0], [0.5, 0.0]]), 3)
    assert ids.tolist() == [[2, 1, 3], [1, 3, 0], [0, 1, 3]]
    assert_close(weights, torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]]))


def test_masked_latents_belong_to_no_code_and_channels_may_come_first() -> None:
    torch.manual_seed(0)
    z, mask = torch.randn(2, 6, 3), torch.rand(2, 6) < 0.5
    last, first = VQ(9, 3), VQ(9, 3, channels_first=True)
    first.load_state_dict(last.state_dict())
    whole = last.soft_assign(z, 2)
    ids, weights = first.soft_assign(z.movedim(-1, 1), 2, mask)
    assert torch.equal(ids, torch.where(mask[..., None], whole.ids, PADDING))
    assert torch.equal(weights, torch.where(mask[..., None], whole.weights, 0))


def test_what_has_no_nearest_codes_says_so() -> None:
    with pytest.raises(ValueError, match="13 neighbours of 12 codes: ask for 1 to 12"):
        VQ(12, 3).soft_assign(torch.randn(2, 3), 13)
    with pytest.raises(ValueError, match="IBQ has no nearest codes"):
        IBQ(12, 3).soft_assign(torch.randn(2, 3), 2)
    with pytest.raises(ValueError, match="1 of 2 latents are not finite"):
        VQ(12, 3).soft_assign(torch.tensor([[1.0, 2.0, 3.0], [0.0, torch.nan, 1.0]]), 2)


def test_memory_does_not_hold_a_tokens_by_codes_matrix() -> None:
    quantizer, z = VQ(16384, 4), torch.randn(2048, 4)
    quantizer.soft_assign(z, 4)
    with torch.profiler.profile(profile_memory=True) as profile:
        quantizer.soft_assign(z, 4)
    alive, peak = 0, 0
    results: Any = profile.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert 0 < peak < 24e6 < 4 * 2048 * 16384
