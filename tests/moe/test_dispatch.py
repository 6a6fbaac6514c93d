"""Sorted rows and gated sums: their gradients, precision, and the same under torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from simvq_moe import MoE
from simvq_moe.moe.dispatch import dispatch, gated_sum, sorted_rows
from simvq_moe.moe.experts import grouped_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, EXPERTS, TOP_K, WIDTH = 40, 5, 3, 8


def sorting(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Ids of a random choice, their sorted order and its inverse."""
    torch.manual_seed(0)
    ids = torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices
    order = ids.reshape(-1).argsort(stable=True)
    places = order.argsort().view(TOKENS, TOP_K)
    return ids.to(device), order.to(device), places.to(device)


def test_the_way_there_and_back_has_the_gradients_of_plain_indexing() -> None:
    _, order, places = sorting()
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(TOKENS, TOP_K, dtype=torch.float64, requires_grad=True)
    got = gated_sum(sorted_rows(x, order, places).sin(), gates, order, places)
    expected = (gates[:, :, None] * x[order // TOP_K].sin()[places]).sum(1)
    assert_close(got, expected)
    direction = torch.randn_like(got)
    assert_close(
        torch.autograd.grad(got, (x, gates), direction),
        torch.autograd.grad(expected, (x, gates), direction),
    )


def test_sums_of_bfloat16_rows_are_rounded_once() -> None:
    _, order, places = sorting()
    rows = torch.randn(TOKENS * TOP_K, WIDTH).bfloat16()
    gates = torch.rand(TOKENS, TOP_K).bfloat16()
    exact = (gates.double()[:, :, None] * rows.double()[places]).sum(1)
    off = (gated_sum(rows, gates, order, places).double() - exact).abs()
    # half of the distance of neighbours at most, of which bfloat16 has 128 in an octave
    assert (off <= (1 + 1e-4) * exact.abs() * 2.0**-8 + 1e-6).all()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_gpu_gives_what_the_cpu_gives(dtype: torch.dtype) -> None:
    ids, _, _ = sorting()
    x = torch.randn(TOKENS, WIDTH, dtype=dtype)
    gates = torch.rand(TOKENS, TOP_K, dtype=dtype)
    weights = torch.randn(EXPERTS, WIDTH, WIDTH, dtype=dtype)

    def results(device: str) -> list[Tensor]:
        inputs = [t.detach().to(device).requires_grad_() for t in (x, gates, weights)]
        y = dispatch(
            inputs[0],
            ids.to(device),
            inputs[1],
            lambda rows, counts: grouped_product(rows, inputs[2], counts),
            EXPERTS,
        )
        return [y, *torch.autograd.grad(y.sin().sum(), inputs)]

    assert_close([t.cpu() for t in results("cuda")], results("cpu"))


# torch's own tracing of an autograd function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_layer_is_the_same(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    moe = MoE(8, 16, EXPERTS, 2, expert_out_map="linear").to(dtype)
    compiled: Any = torch.compile(moe, backend="aot_eager", fullgraph=True)
    x = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    inputs = [x, *moe.parameters()]
    expected = torch.autograd.grad(moe(x).sin().sum(), inputs)
    got = torch.autograd.grad(compiled(x).sin().sum(), inputs)
    assert_close(compiled(x), moe(x))
    assert_close(got, expected)
