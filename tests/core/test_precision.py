"""Searches are float32 whatever switch allowed less, and every switch is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from simvq_moe import SimVQ
from simvq_moe.core.precision import LEVELS, full_precision
from simvq_moe.quantizers import IBQ

BACKENDS: Any = torch.backends
"""Some of its switches have no types."""
SWITCHES = {
    "nothing": lambda: None,
    "old, high": lambda: torch.set_float32_matmul_precision("high"),
    "old, medium": lambda: torch.set_float32_matmul_precision("medium"),
    "old, of CUDA": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "new, for all": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "new, of CUDA": lambda: setattr(BACKENDS.cudnn, "fp32_precision", "tf32"),
    "new, of its products": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "new, of oneDNN's products": lambda: setattr(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
}


def reset() -> None:
    torch.set_float32_matmul_precision("highest")
    for level in LEVELS:
        torch._C._set_fp32_precision_setter(*level, "none")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    reset()
    yield
    reset()


def state() -> dict[object, str]:
    """Every switch, and what they say once the outer ones are taken away."""
    found: dict[object, str] = {}
    try:
        found["old"] = torch.get_float32_matmul_precision()
    except RuntimeError:
        found["old"] = "not the new one's"
    found |= {level: torch._C._get_fp32_precision_getter(*level) for level in LEVELS}
    outer = BACKENDS.fp32_precision
    BACKENDS.fp32_precision = "none"
    found |= {("alone", level): torch._C._get_fp32_precision_getter(*level) for level in LEVELS}
    BACKENDS.fp32_precision = outer
    return found


@pytest.mark.parametrize("name", list(SWITCHES))
def test_products_are_float32_inside_and_switches_are_as_they_were_after(name: str) -> None:
    SWITCHES[name]()
    before = state()
    with full_precision():
        assert torch.get_float32_matmul_precision() == "highest"
        for operation in (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul):
            assert operation.fp32_precision == "ieee"
    assert state() == before


@pytest.mark.parametrize("name", list(SWITCHES))
def test_a_quantizer_works_under_every_switch(name: str) -> None:
    torch.manual_seed(0)
    quantizer, z = SimVQ(64, 8), torch.randn(20, 8)
    expected = quantizer.encode(z)
    SWITCHES[name]()
    assert torch.equal(quantizer.encode(z), expected)
    assert torch.equal(quantizer.eval().encode(z), expected)


@pytest.mark.parametrize("name", list(SWITCHES))
def test_codes_of_a_trained_map_are_searched_and_folded_in_float32(name: str) -> None:
    torch.manual_seed(0)
    quantizer, z = SimVQ(256, 64, bias=True), torch.randn(2000, 64)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.04)
    expected, folded = quantizer.encode(z), quantizer.fold().codebook()
    scored = IBQ(256, 64)
    best = scored.encode(z)
    SWITCHES[name]()
    assert torch.equal(quantizer.eval().encode(z), expected)
    assert torch.equal(quantizer.fold().codebook(), folded)
    assert torch.equal(scored.encode(z), best)
    assert torch.equal(scored(z).ids, best)
