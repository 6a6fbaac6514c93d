"""Two ranks give the codebook of one rank on the joined batch, for every quantizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.testing import assert_close

from simvq_moe import EMAVQ, FSQ, LFQ, VQ, ResidualQuantizer, SimVQ
from simvq_moe.core.usage import counters
from simvq_moe.quantizers import IBQ, MLPVQ, AnyQuantizer, CosineVQ, GroupVQ, Projected

STEPS, TOKENS, WIDTH = 4, 32, 4


def quantizers() -> dict[str, AnyQuantizer]:
    torch.manual_seed(0)
    return {
        "vq": VQ(12, WIDTH),
        "vq kmeans": VQ(12, WIDTH, init="kmeans"),
        "ema": EMAVQ(12, WIDTH, decay=0.9),
        "ema kmeans": EMAVQ(12, WIDTH, decay=0.9, init="kmeans"),
        "ema restart": EMAVQ(12, WIDTH, decay=0.5, restart=0.9),
        "cosine": CosineVQ(12, WIDTH),
        "simvq": SimVQ(12, WIDTH),
        "simvq data": SimVQ(12, WIDTH, init="data"),
        "simvq both": SimVQ(12, WIDTH, train_base=True, bias=True),
        "group": GroupVQ(12, WIDTH, groups=2),
        "mlp": MLPVQ(12, WIDTH),
        "ibq": IBQ(12, WIDTH),
        "projected lfq": Projected(LFQ(3, temperature=1.0), WIDTH),
        "residual": ResidualQuantizer([EMAVQ(6, WIDTH), SimVQ(6, WIDTH, init="data")]),
        "fsq": Projected(FSQ([4, 3]), WIDTH),
    }


def trained(rank: int, ranks: int) -> dict[str, Any]:
    """State and usage of each quantizer after a few data-parallel steps on this rank's share."""
    found: dict[str, Any] = {}
    for name, quantizer in quantizers().items():
        parameters = list(quantizer.parameters())
        generator = torch.Generator().manual_seed(1)
        for step in range(STEPS):
            batch = torch.randn(TOKENS, WIDTH, generator=generator) + 2
            if name.startswith("ema") and step == STEPS - 1:
                batch = batch[:1].repeat(TOKENS, 1)  # most codes starve
            out = quantizer(batch.chunk(ranks)[rank])
            if not parameters:
                continue
            quantizer.zero_grad()
            (out.loss + out.z_q.sin().mean()).backward()
            for parameter in parameters:
                if parameter.grad is not None:
                    if ranks > 1:
                        dist.all_reduce(parameter.grad)
                    parameter.data -= 0.1 * parameter.grad / ranks
        counts = [counter.counts for counter in counters(quantizer)]
        found[name] = ({k: v.clone() for k, v in quantizer.state_dict().items()}, counts)
    return found


def worker(rank: int, ranks: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=ranks
    )
    torch.save(trained(rank, ranks), f"{directory}/{rank}.pt")
    # a rank without a valid token still enters every collective
    torch.manual_seed(0)
    ema = EMAVQ(4, 2, restart=0.5)
    ema(torch.randn(5 * rank, 2))
    torch.save(ema.codebook(), f"{directory}/empty{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_give_the_codebook_of_one_rank_on_the_joined_batch(tmp_path: Path) -> None:
    spawn(worker, args=(2, str(tmp_path)), nprocs=2)
    single = trained(0, 1)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, (state, counts) in single.items():
        for rank in (first, second):
            assert_close(rank[name][0], state, msg=lambda m, name=name: f"{name}: {m}")
        both = [a + b for a, b in zip(first[name][1], second[name][1], strict=True)]
        assert_close(both, counts, msg=lambda m, name=name: f"{name}: {m}")
    empty = [torch.load(tmp_path / f"empty{rank}.pt") for rank in range(2)]
    assert_close(*empty)
