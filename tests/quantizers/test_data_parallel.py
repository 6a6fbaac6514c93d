"""Ranks give the codebook of one rank on the joined batch, for every quantizer and any masks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from simvq_moe import EMAVQ, FSQ, LFQ, VQ, ResidualQuantizer, SimVQ
from simvq_moe.core.usage import counters
from simvq_moe.quantizers import (
    BSQ,
    IBQ,
    MLPVQ,
    NSVQ,
    AnyQuantizer,
    CosineVQ,
    GroupVQ,
    Projected,
    RunningMapVQ,
)
from tests.launching import on_ranks

RANKS, STEPS, TOKENS, WIDTH = 3, 4, 33, 4


def quantizers() -> dict[str, AnyQuantizer]:
    torch.manual_seed(0)
    return {
        "vq": VQ(12, WIDTH),
        "vq kmeans": VQ(12, WIDTH, init="kmeans"),
        "vq restart": VQ(12, WIDTH, restart=0.99),
        "ema": EMAVQ(12, WIDTH, decay=0.9),
        "ema kmeans": EMAVQ(12, WIDTH, decay=0.9, init="kmeans"),
        "ema restart": EMAVQ(12, WIDTH, decay=0.5, restart=0.9),
        "ns": NSVQ(12, WIDTH, halving=2),
        "running map": RunningMapVQ(12, WIDTH, decay=0.9),
        "cosine": CosineVQ(12, WIDTH),
        "cosine restart": CosineVQ(12, WIDTH, restart=0.99),
        "simvq": SimVQ(12, WIDTH),
        "simvq data": SimVQ(12, WIDTH, init="data"),
        "simvq both": SimVQ(12, WIDTH, train_base=True, bias=True),
        "group": GroupVQ(12, WIDTH, groups=2),
        "group data": GroupVQ(12, WIDTH, groups=2, init="data"),
        "mlp": MLPVQ(12, WIDTH),
        "ibq": IBQ(12, WIDTH),
        "projected lfq": Projected(LFQ(3, temperature=1.0), WIDTH),
        "projected bsq": Projected(BSQ(3, temperature=1.0), WIDTH),
        "residual": ResidualQuantizer([EMAVQ(6, WIDTH), SimVQ(6, WIDTH, init="data")]),
        "fsq": Projected(FSQ([4, 3]), WIDTH),
    }


def valid(step: int) -> Tensor:
    """Where latents are valid: nearly all of one rank's, one of the next, none of the third."""
    mask = torch.zeros(RANKS, TOKENS // RANKS, dtype=torch.bool)
    mask[step % RANKS, 2:] = mask[(step + 1) % RANKS, 5] = True
    return mask.flatten()


def trained(rank: int, ranks: int, *, masked: bool) -> dict[str, Any]:
    """State, usage and mean loss of each quantizer after steps on this rank's share."""
    found: dict[str, Any] = {}
    for name, quantizer in quantizers().items():
        parameters, losses = list(quantizer.parameters()), []
        generator = torch.Generator().manual_seed(1)
        for step in range(STEPS):
            batch = torch.randn(TOKENS, WIDTH, generator=generator) + 2
            if "restart" in name and step == STEPS - 1:
                batch = batch[:1].repeat(TOKENS, 1)  # most codes starve
            mask = valid(step) if masked else torch.ones(TOKENS, dtype=torch.bool)
            mine = mask.chunk(ranks)[rank]
            out = quantizer(batch.chunk(ranks)[rank], mine if masked else None)
            losses.append(mean(out.loss.detach(), ranks))
            quantizer.zero_grad()
            if parameters:
                task = out.z_q[mine].sin().sum() / (int(mask.sum()) / ranks)
                (out.loss + task).backward()
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.data -= 0.1 * mean(parameter.grad, ranks)
        counts = [counter.counts for counter in counters(quantizer)]
        state = {k: v.clone() for k, v in quantizer.state_dict().items()}
        found[name] = {"state": state, "counts": counts, "losses": losses}
    return found


def mean(x: Tensor, ranks: int) -> Tensor:
    x = x.clone()
    if ranks > 1:
        dist.all_reduce(x)
    return x / ranks


def compiled_equals_eager(rank: int) -> None:
    """Collectives are part of the graph."""
    jaxtyping.config.update("jaxtyping_disable", True)  # shape checks cannot be traced
    for name in ("ema restart", "projected lfq"):
        quantizer = quantizers()[name]
        twin = copy.deepcopy(quantizer)
        compiled: Any = torch.compile(twin, backend="aot_eager", fullgraph=True)
        z = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(rank))
        a, b = quantizer(z), compiled(z)
        assert_close(b, a)
        assert_close(twin.state_dict(), quantizer.state_dict())


def train(rank: int, directory: str) -> None:
    join(rank, directory)
    for masked in (False, True):
        torch.save(trained(rank, RANKS, masked=masked), f"{directory}/{rank}{masked}.pt")
    if rank == 0:  # a batch more than the others have: evaluation must not wait for them
        for quantizer in quantizers().values():
            quantizer.eval()(torch.randn(5, WIDTH), torch.arange(5) < 3)
    dist.destroy_process_group()


def compile_(rank: int, directory: str) -> None:
    join(rank, directory)
    compiled_equals_eager(rank)
    dist.destroy_process_group()


def join(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=RANKS
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each rank has found."""
    path = tmp_path_factory.mktemp("ranks")
    on_ranks(train, str(path), ranks=RANKS)
    return path


@pytest.mark.distributed
@pytest.mark.parametrize("masked", [False, True])
def test_ranks_give_the_codebook_of_one_rank_on_the_joined_batch(
    folder: Path, masked: bool
) -> None:
    single = trained(0, 1, masked=masked)
    ranks = [torch.load(folder / f"{rank}{masked}.pt") for rank in range(RANKS)]
    for name, expected in single.items():
        for rank in ranks:
            assert_close(rank[name]["state"], expected["state"], msg=lambda m, n=name: f"{n}: {m}")
            assert_close(
                rank[name]["losses"], expected["losses"], msg=lambda m, n=name: f"{n}: {m}"
            )
        added = [sum(each) for each in zip(*(rank[name]["counts"] for rank in ranks), strict=True)]
        assert_close(added, expected["counts"], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.distributed
def test_collectives_are_part_of_the_compiled_graph(tmp_path: Path) -> None:
    on_ranks(compile_, str(tmp_path), ranks=RANKS)
