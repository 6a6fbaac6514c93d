"""Searches and expert layers on the device equal float64 formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from simvq_moe.core.search.nearest import nearest
from simvq_moe.moe import MoE
from tests.device.place import DEVICE, on_device

pytestmark = on_device


def near_ties(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    codes = torch.randn(512, 32, generator=generator)
    return codes[:400] + 1e-3 * torch.randn(400, 32, generator=generator), codes


def clusters(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    centres = 10 * torch.randn(8, 32, generator=generator)
    codes = centres.repeat(100, 1) + 1e-2 * torch.randn(800, 32, generator=generator)
    return codes[torch.randperm(800, generator=generator)[:300]] + 1e-2, codes


def huge_norms(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    codes = torch.randn(700, 32, generator=generator)
    codes[::7] *= 1e4
    return torch.randn(300, 32, generator=generator), codes


def far_away(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(n, 32, generator=generator) + 1e3 for n in (300, 700))  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("case", [near_ties, clusters, huge_norms, far_away])
def test_the_search_finds_a_code_as_near_as_float64_does(case) -> None:
    z, codes = case(torch.Generator().manual_seed(0))
    found = nearest(z.to(DEVICE), codes.to(DEVICE)).cpu()
    distances = torch.cdist(z.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    chosen = distances.gather(1, found[:, None]).squeeze(1)
    # scores are products in float32, whose rounding is that of the squared norms
    rounding = 1e-6 * (z.double().square().sum(1) + codes[found].double().square().sum(1))
    assert (chosen.square() <= distances.amin(1).square() + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expert", ["gelu", "swiglu"])
def test_a_layer_equals_one_expert_after_the_other(expert: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = MoE(64, 32, 16, 4, expert=expert, expert_out_map="linear")  # pyright: ignore[reportArgumentType]
    exact = MoE(64, 32, 16, 4, expert=expert, expert_out_map="linear").double()  # pyright: ignore[reportArgumentType]
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(2, 128, 64)
    x = x.to(dtype).float()
    layer = layer.to(DEVICE)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        y = layer(x.to(DEVICE)).float().cpu().double()
    wanted = exact(x.double())
    loose = 1e-4 if dtype == torch.float32 else 3e-2
    # where rounding turns a near tie of two experts the whole token differs
    same = ((y - wanted).norm(dim=-1) <= loose * wanted.norm(dim=-1).mean()).double().mean()
    assert same > (0.99 if dtype == torch.float32 else 0.9)


def test_gradients_of_a_layer_equal_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    layer = MoE(64, 32, 16, 4, expert_in_map="linear", expert_out_map="linear")
    x = torch.randn(2, 128, 64)

    def gradients(device: str) -> list[Tensor]:
        own, inputs = layer.to(device), x.to(device).requires_grad_()
        found = torch.autograd.grad(own(inputs).sin().sum(), [inputs, *own.parameters()])
        return [gradient.cpu() for gradient in found]

    assert_close(gradients(DEVICE), gradients("cpu"), rtol=1e-3, atol=1e-4)
