"""The Triton kernel finds what the matrix product finds: on a GPU, or in Triton's interpreter:

TRITON_INTERPRET=1 python -m pytest tests/core/test_nearest_triton.py
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from simvq_moe.core.nearest_triton import best_codes  # noqa: E402  # needs Triton


def half_norms(codes: Tensor) -> Tensor:
    return codes.square().sum(1) / 2


@pytest.mark.parametrize(
    ("tokens", "codes", "width"), [(1, 1, 1), (70, 300, 20), (7, 1000, 33), (130, 129, 64)]
)
def test_scores_and_ids_equal_the_product(tokens: int, codes: int, width: int) -> None:
    torch.manual_seed(0)
    z, e = torch.randn(tokens, width, device=DEVICE), torch.randn(codes, width, device=DEVICE)
    value, ids = best_codes(z, e, half_norms(e))
    exact = z.double() @ e.double().T - half_norms(e.double())
    assert torch.equal(ids, exact.argmax(1))
    assert_close(value, exact.amax(1).float())


def test_ties_go_to_the_lowest_id_within_and_across_slices() -> None:
    g = torch.Generator().manual_seed(0)
    e = torch.randint(-2, 3, (3, 4), generator=g).float().repeat(300, 1).to(DEVICE)
    z = torch.randint(-2, 3, (40, 4), generator=g).float().to(DEVICE)
    _, ids = best_codes(z, e, half_norms(e))
    scores = z @ e.T - half_norms(e)
    assert torch.equal(ids, (scores == scores.amax(1, keepdim=True)).int().argmax(1))


def test_a_token_that_is_not_a_number_scores_minus_infinity() -> None:
    z, e = torch.ones(3, 4, device=DEVICE), torch.ones(5, 4, device=DEVICE)
    z[1, 2] = torch.nan
    value, _ = best_codes(z, e, half_norms(e))
    assert value.isfinite().tolist() == [True, False, True]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_search_on_a_gpu_equals_float64_brute_force() -> None:
    from simvq_moe.core.nearest import nearest

    torch.manual_seed(0)
    z, e = torch.randn(3000, 48, device=DEVICE), torch.randn(20_000, 48, device=DEVICE)
    assert torch.equal(nearest(z, e), torch.cdist(z.double(), e.double()).argmin(1))
