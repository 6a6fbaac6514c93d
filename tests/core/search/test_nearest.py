"""The search returns the nearest code, always: against float64 brute force, on ties and on NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simvq_moe.core.search.nearest import nearest


def brute_force(z: Tensor, codes: Tensor) -> Tensor:
    """argmin of the float64 squared distances; the first of equals."""
    return (z.double()[:, None] - codes.double()).square().sum(-1).argmin(1)


@settings(deadline=None)
@given(
    tokens=st.integers(0, 9),
    codes=st.integers(1, 2100),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
def test_ids_equal_float64_brute_force(tokens: int, codes: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    book = torch.randn(codes, width, generator=generator, dtype=torch.float64)
    assert torch.equal(nearest(z, book), brute_force(z, book))


def test_ties_go_to_the_lowest_id_across_tiles() -> None:
    # integers: every product and norm is exact, so equal codes score exactly the same
    book = torch.randint(-3, 4, (3, 4), generator=torch.Generator().manual_seed(0)).float()
    many = book.repeat(1500, 1)
    z = book + 0.25
    assert torch.equal(nearest(z, many), brute_force(z, book))


@pytest.mark.parametrize("groups", [1, 3, 5])
def test_a_map_for_each_block_of_codes_is_searched_as_its_rows(groups: int) -> None:
    torch.manual_seed(0)
    q, W, b = torch.randn(groups, 700, 4), torch.randn(groups, 4, 6), torch.randn(groups, 6)
    z, rows = torch.randn(50, 6), (q @ W + b[:, None]).flatten(0, 1)
    assert torch.equal(nearest(z, q.flatten(0, 1), W=W, bias=b), brute_force(z, rows))


# Triton's interpreter computes by NumPy, which warns
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["latents", "codebook"])
def test_input_that_is_not_finite_is_an_error_and_never_a_silent_id(
    value: float, where: str
) -> None:
    z, book = torch.randn(5, 4), torch.randn(3000, 4)
    (z if where == "latents" else book)[-1, 0] = value
    with pytest.raises(ValueError, match="not finite"):
        nearest(z, book)


def test_the_search_has_no_gradient() -> None:
    z, book = torch.randn(3, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    assert not nearest(z, book).requires_grad
