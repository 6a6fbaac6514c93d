"""The search that rules out codes on tensor cores finds what the float32 kernel finds, to the bit,
whatever the data: on a GPU, or in Triton's interpreter, which adds up in another order.

TRITON_INTERPRET=1 python -m pytest tests/core/search/test_screening_triton.py
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.search.test_nearest_triton import (
    DEVICE,
    INTERPRETED,
    half_norms,
    machine_code,
    runs,
)
from tests.core.search.test_screening import KINDS, aligned, data

pytest.importorskip("triton")

from simvq_moe.core.search import nearest as search
from simvq_moe.core.search import screening_triton  # needs Triton
from simvq_moe.core.search.nearest_triton import CODES, best_codes
from simvq_moe.core.search.screening_triton import (
    best_screened,
    groups_that_may_win,
    listed,
)


def nothing_before(z: Tensor) -> Tensor:
    return z.new_full((len(z),), -torch.inf)


@runs
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "codes", "width"), [(1, 1, 1), (150, 700, 33), (40, 1290, 72)])
def test_scores_and_ids_are_those_of_the_float32_kernel(
    kind: str, tokens: int, codes: int, width: int
) -> None:
    z, e = (x.to(DEVICE) for x in data(kind, tokens, codes, width, seed=0))
    value, ids = best_screened(z, e, half_norms(e), nothing_before(z))
    all_value, all_ids = best_codes(z, e, half_norms(e))
    assert torch.equal(value, all_value)
    assert torch.equal(ids, all_ids)


@runs
@pytest.mark.parametrize("kind", KINDS)
def test_the_group_of_the_exact_winner_is_kept(kind: str) -> None:
    z, e = (x.to(DEVICE) for x in data(kind, 60, 900, 48, seed=1))
    keep = groups_that_may_win(z, e, half_norms(e), nothing_before(z))
    exact = (z.double() @ e.double().T - e.double().square().sum(1) / 2).argmax(1)
    assert bool(keep[exact // CODES, torch.arange(len(z))].all())


@runs
def test_codes_that_earlier_ones_beat_are_not_met_at_all() -> None:
    torch.manual_seed(0)
    z = torch.randn(50, 16, device=DEVICE)
    e = torch.cat([z + 0.01, 100 + torch.randn(600, 16, device=DEVICE)])
    first, _ = best_codes(z, e[:50], half_norms(e[:50]))
    keep = groups_that_may_win(z, e[50:], half_norms(e[50:]), first)
    assert not bool(keep.any())
    value, _ = best_screened(z, e[50:], half_norms(e[50:]), first)
    assert bool((value == -torch.inf).all())


@runs
def test_most_codes_of_spread_out_data_are_ruled_out() -> None:
    torch.manual_seed(0)
    z, e = torch.randn(64, 32, device=DEVICE), torch.randn(4096, 32, device=DEVICE)
    keep = groups_that_may_win(z, e, half_norms(e), nothing_before(z))
    assert float(keep.float().mean()) < 0.1


@runs
@pytest.mark.parametrize("near", [0.0, 2.0**-6, 0.25])
@pytest.mark.parametrize("width", [16, 64])
def test_no_code_is_lost_where_all_rounding_errors_align(near: float, width: int) -> None:
    z, e = (x.to(DEVICE) for x in aligned(near, width))
    _, ids = best_screened(z, e, half_norms(e), nothing_before(z))
    assert torch.equal(ids, best_codes(z, e, half_norms(e))[1])


@runs
def test_a_smaller_bound_would_lose_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test before this one notices a bound that is too small."""
    whole = screening_triton.terms_of_groups
    monkeypatch.setattr(screening_triton, "terms_of_groups", lambda *x: 0.7 * whole(*x))
    lost = 0
    for width in (16, 64):
        z, e = (x.to(DEVICE) for x in aligned(0.0, width))
        _, ids = best_screened(z, e, half_norms(e), nothing_before(z))
        lost += int((ids != best_codes(z, e, half_norms(e))[1]).sum())
    assert lost


@runs
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("huge", [1e18, 1e20, float("inf"), float("nan")])
def test_a_token_beyond_all_bounds_keeps_every_group(huge: float) -> None:
    z, e = torch.ones(3, 4, device=DEVICE), torch.ones(300, 4, device=DEVICE)
    z[1] *= huge
    value, ids = best_screened(z, e, half_norms(e), nothing_before(z))
    all_value, all_ids = best_codes(z, e, half_norms(e))
    assert torch.equal(value, all_value)
    assert torch.equal(ids, all_ids)


@runs
@pytest.mark.parametrize("kind", KINDS)
def test_a_search_of_several_tiles_finds_the_same_ids_with_screening_and_without(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, e = (x.to(DEVICE) for x in data(kind, 90, 2500, 24, seed=2))
    ids: list[Tensor] = []
    for way in (0, 1):
        monkeypatch.setattr(search, "_has_tensor_cores", lambda _: True)
        monkeypatch.setattr(search, "_faster", lambda _, *ways, way=way: ways[way]())
        ids.append(search.nearest(z, e))
    assert torch.equal(*ids)


def test_lists_hold_the_tokens_of_each_group_in_order() -> None:
    keep = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    lists, counts = listed(keep)
    assert counts.tolist() == [3, 0, 4]
    kept = [row[:n].tolist() for row, n in zip(lists, counts.tolist(), strict=True)]
    assert kept == [[0, 2, 3], [], [0, 1, 2, 3]]


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel is not compiled")
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_to_products_of_tensor_cores(capability: int) -> None:
    pointers = {"z16": "*bf16", "codes16": "*bf16", "half_norms": "*fp32", "top": "*fp32"}
    fixed: dict[str, Any] = {"width": 128, "INTERPRETED": False, "CODES": CODES}
    fixed |= {"TOKENS": screening_triton.TOKENS, "CHANNELS": screening_triton.CHANNELS}
    kernel = screening_triton._top_of_group
    built = machine_code(kernel, pointers, ("tokens", "count"), fixed, capability)
    assert re.search(r"mma\S+f32\.bf16\.bf16", built.asm["ptx"])
