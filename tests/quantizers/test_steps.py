"""Codes average and restart once a step, however the step's batch is divided."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from simvq_moe import EMAVQ, VQ, ResidualQuantizer
from simvq_moe.core.step_state import after_step, drop_step, follow_steps
from simvq_moe.engine.world import World
from simvq_moe.quantizers import NSVQ, AnyQuantizer, CosineVQ, GroupedQuantizer, RunningMapVQ
from tests.two_ranks import TwoRanks

WIDTH, STEPS, TOKENS = 4, 5, 24
BUILD: dict[str, Callable[[], AnyQuantizer]] = {
    "ema": lambda: EMAVQ(12, WIDTH, decay=0.5),
    "ema restart": lambda: EMAVQ(12, WIDTH, decay=0.5, restart=0.9),
    "vq restart": lambda: VQ(12, WIDTH, restart=0.985),
    "cosine restart": lambda: CosineVQ(12, WIDTH, restart=0.985),
    "ns": lambda: NSVQ(12, WIDTH, halving=2),
    "ns restart": lambda: NSVQ(12, WIDTH, restart=0.985),
    "running map": lambda: started(RunningMapVQ(12, WIDTH, decay=0.5)),
    "levels": lambda: ResidualQuantizer(
        [EMAVQ(12, WIDTH, decay=0.5, restart=0.9), VQ(12, WIDTH, restart=0.985)]
    ),
}


def started(quantizer: RunningMapVQ) -> RunningMapVQ:
    """From the first batch as a whole, as training does before the first step."""
    quantizer.initialize(batches()[0])
    return quantizer


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(TOKENS, WIDTH, generator=generator) + 1 for _ in range(STEPS)]


def trained(name: str, parts: int | None, rank: int = 0, ranks: int = 1) -> AnyQuantizer:
    """After steps of so many micro-batches, which ranks share; None: of forward passes alone."""
    torch.manual_seed(0)
    quantizer = BUILD[name]()
    if parts is not None:
        follow_steps(quantizer)
    for batch in batches():
        for micro_batch in batch.chunk(parts or 1):
            quantizer(micro_batch.chunk(ranks)[rank])
        with torch.no_grad():  # an optimizer, before the state follows
            for p in quantizer.parameters():
                p += 0.01
        if parts is not None:
            after_step(quantizer)
    return quantizer


@pytest.mark.parametrize("name", list(BUILD))
def test_without_accumulation_every_bit_is_that_of_forward_passes_alone(name: str) -> None:
    alone, stepped = trained(name, None), trained(name, 1)
    assert_close(stepped.state_dict(), alone.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", list(BUILD))
def test_micro_batches_change_nothing(name: str) -> None:
    whole = trained(name, 1)
    start = BUILD[name]()
    for parts in (2, 4):
        assert_close(trained(name, parts).state_dict(), whole.state_dict())
    steps = [v for k, v in whole.state_dict().items() if k.endswith("step")]
    if name == "running map":  # the first batch also started it
        assert float(whole.state_dict()["weight"]) == sum(0.5**age for age in range(STEPS + 1))
    else:
        assert steps
    assert all(int(step) == STEPS for step in steps)
    assert start.state_dict().keys() == whole.state_dict().keys()


@pytest.mark.parametrize("name", list(BUILD))
def test_until_the_step_ends_nothing_changes_and_a_dropped_step_leaves_nothing(name: str) -> None:
    quantizer = trained(name, 2)
    twin = copy.deepcopy(quantizer)
    quantizer(batches()[0])
    assert_close(quantizer.state_dict(), twin.state_dict(), rtol=0, atol=0)
    drop_step(quantizer)
    after_step(quantizer)
    assert_close(quantizer.state_dict(), twin.state_dict(), rtol=0, atol=0)
    quantizer(batches()[1])
    twin(batches()[1])
    after_step(quantizer)
    after_step(twin)
    assert_close(quantizer.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_evaluation_is_no_part_of_a_step() -> None:
    quantizer = trained("ema", 2)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()(batches()[0])
    after_step(quantizer)
    assert_close(quantizer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("family", [ResidualQuantizer, GroupedQuantizer])
@pytest.mark.parametrize("name", list(BUILD))
def test_a_codebook_that_levels_or_heads_share_takes_one_step_a_forward_pass(
    name: str, family: type[ResidualQuantizer] | type[GroupedQuantizer]
) -> None:
    if (name, family) == ("cosine restart", ResidualQuantizer):
        pytest.skip("codes of one length are no levels")
    found: list[dict[str, Tensor]] = []
    for waits in (False, True):
        torch.manual_seed(0)
        shared = BUILD[name]()
        quantizer = family([shared, shared]).train()
        if waits:
            follow_steps(quantizer)
        for z in batches():
            quantizer(z if family is ResidualQuantizer else torch.cat([z, z.flip(0)], -1))
            if waits:
                after_step(quantizer)
        found.append(shared.state_dict())
    assert_close(found[0], found[1], rtol=0, atol=0)


# of torch itself, where it traces an autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("name", ["ema restart", "vq restart", "ns", "running map"])
def test_a_compiled_pass_that_is_run_again_is_no_step(name: str, waits: bool) -> None:
    found: list[dict[str, Tensor]] = []
    for again in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        quantizer = BUILD[name]().train()
        if waits:
            follow_steps(quantizer)
        compiled: Any = torch.compile(lambda z, q=quantizer: q(z).loss, backend="aot_eager")
        for z in batches()[:3]:
            z = z.requires_grad_()
            loss = checkpoint(compiled, z, use_reentrant=False) if again else compiled(z)
            assert isinstance(loss, Tensor)
            loss.backward()
            after_step(quantizer)
        found.append(quantizer.state_dict())
    assert_close(found[0], found[1], rtol=0, atol=0)


def _states(world: World, parts: int) -> dict[str, dict[str, list[float]]]:
    return {
        name: {
            k: v.double().flatten().tolist()
            for k, v in trained(name, parts, world.rank, world.size).state_dict().items()
        }
        for name in BUILD
    }


@pytest.mark.distributed
def test_two_ranks_with_micro_batches_are_one_on_the_whole_batch(two_ranks: TwoRanks) -> None:
    for found in two_ranks(_states, 2):
        for name in BUILD:
            expected = trained(name, 1).state_dict()
            for key, values in expected.items():
                assert_close(torch.tensor(found[name][key]), values.float().flatten(), msg=key)
