"""The Triton kernel finds what the matrix product finds: on a GPU, or in Triton's interpreter:

TRITON_INTERPRET=1 python -m pytest tests/core/search -k nearest
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton")

from simvq_moe.core.search import nearest_triton  # noqa: E402  # needs Triton
from simvq_moe.core.search.nearest import nearest  # noqa: E402
from simvq_moe.core.search.nearest_triton import best_codes  # noqa: E402

runs = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs a CUDA device or TRITON_INTERPRET=1"
)


def half_norms(codes: Tensor) -> Tensor:
    return codes.square().sum(1) / 2


@runs
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


@runs
def test_ties_go_to_the_lowest_id_within_and_across_slices() -> None:
    g = torch.Generator().manual_seed(0)
    e = torch.randint(-2, 3, (3, 4), generator=g).float().repeat(300, 1).to(DEVICE)
    z = torch.randint(-2, 3, (40, 4), generator=g).float().to(DEVICE)
    _, ids = best_codes(z, e, half_norms(e))
    scores = z @ e.T - half_norms(e)
    assert torch.equal(ids, (scores == scores.amax(1, keepdim=True)).int().argmax(1))


@runs
def test_a_token_that_is_not_a_number_scores_minus_infinity() -> None:
    z, e = torch.ones(3, 4, device=DEVICE), torch.ones(5, 4, device=DEVICE)
    z[1, 2] = torch.nan
    value, _ = best_codes(z, e, half_norms(e))
    assert value.isfinite().tolist() == [True, False, True]


@runs
def test_the_search_is_the_kernels_and_equals_float64_brute_force() -> None:
    torch.manual_seed(0)
    z, q = torch.randn(90, 24, device=DEVICE), torch.randn(2500, 8, device=DEVICE)
    W, b = torch.randn(8, 24, device=DEVICE), torch.randn(24, device=DEVICE)
    rows = q.double() @ W.double() + b.double()
    exact = (z.double()[:, None] - rows).square().sum(-1).argmin(1)
    assert torch.equal(nearest(z, q, W=W, bias=b), exact)


@runs
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_kernel_finds_the_nearest_code_far_from_the_origin_too(offset: float) -> None:
    g = torch.Generator().manual_seed(0)
    z, e = (torch.randn(n, 24, generator=g) + offset for n in (90, 2500))
    exact = (z.double()[:, None] - e.double()).square().sum(-1).argmin(1)
    assert torch.equal(nearest(z.to(DEVICE), e.to(DEVICE)).cpu(), exact)


def machine_code(
    kernel: Any, pointers: dict[str, str], sizes: Iterable[str], fixed: dict[str, Any], arch: int
) -> Any:
    """A kernel as compiled without a GPU for one of that architecture."""
    from triton import compile, jit
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(fixed, "constexpr")
    # without the type checks that this test run puts around every function
    source = ASTSource(jit(inspect.unwrap(kernel.fn)), signature, fixed)
    built = compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8})
    assert built.asm["cubin"]
    assert ".local" not in built.asm["ptx"]  # no registers spilled
    return built


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel is not compiled")
@pytest.mark.parametrize("listed", [False, True])
def test_it_compiles_to_machine_code_for_an_h100_in_float32_throughout(listed: bool) -> None:
    pointers: dict[str, str] = dict.fromkeys(("z", "codes", "half_norms", "best"), "*fp32")
    pointers |= dict.fromkeys(("ids", "lists", "counts"), "*i32")
    sizes = ("tokens", "count", "per_slice")
    fixed: dict[str, Any] = {"width": 128, "LISTED": listed, "TOKENS": nearest_triton.TOKENS}
    fixed |= {"CODES": nearest_triton.CODES, "CHANNELS": nearest_triton.CHANNELS}
    built = machine_code(nearest_triton._best_of_slice, pointers, sizes, fixed, 90)
    assert built.metadata.shared <= 227 * 1024
    assert "tf32" not in built.asm["ptx"]
