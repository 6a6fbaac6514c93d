"""docs/components.md says what the registry has, and its costs are those of the classes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from simvq_moe.config.quantizer import QuantizerOptions
from simvq_moe.config.registry import Options, family_of, kinds
from simvq_moe.config.schema import TaskOptions
from simvq_moe.costs.components_page import ROOMS, page
from simvq_moe.quantizers import VQ, AnyQuantizer
from simvq_moe.records.trackers.base import TrackerOptions
from tests.launching import ROOT


def test_the_page_is_that_of_the_registry() -> None:
    text = (ROOT / "docs" / "components.md").read_text()
    assert text == page(), "write it anew: see its first lines"


def test_every_family_of_the_package_is_on_the_page() -> None:
    elsewhere = {TaskOptions, TrackerOptions}  # they have no options
    shown = {room.family for room in ROOMS.values()} | elsewhere
    found: set[type[Options]] = set()
    waiting = [Options]
    while waiting:
        options = waiting.pop()
        waiting += options.__subclasses__()
        if options.__module__.startswith("simvq_moe.") and family_of(options) is options:
            found.add(options)
    assert shown == found


@pytest.mark.parametrize("kind", kinds(QuantizerOptions))
def test_a_quantizer_says_how_many_numbers_ranks_add_up(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer = kinds(QuantizerOptions)[kind].example().build()
    assert _added_up(quantizer, monkeypatch) == quantizer.summed_numbers


def test_restarts_add_up_the_draws_of_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = VQ(64, 8, restart=0.1)
    assert _added_up(quantizer, monkeypatch) == quantizer.summed_numbers == 64


def _added_up(quantizer: AnyQuantizer, monkeypatch: pytest.MonkeyPatch) -> int:
    """Numbers of all reductions of a training step, without single ones."""
    sizes: list[int] = []

    def add(x: Tensor) -> None:
        sizes.append(x.numel())

    quantizer.initialize(torch.randn(32, quantizer.width))  # a start is no step
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_reduce", add)
    z = torch.randn(32, quantizer.width, requires_grad=True)
    out = quantizer(z)
    (out.z_q.sum() + out.loss).backward()
    return sum(size for size in sizes if size > 1)
