"""Held-out measures and usage counts over a whole data set, on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from simvq_moe.core.usage import UsageCounter, counting
from simvq_moe.engine.world import World
from simvq_moe.records.usage_metrics import layers_of, usage_metrics
from simvq_moe.tasks.registry import AnyTask


@torch.no_grad()
def evaluate(
    task: AnyTask, world: World, batch_size: int
) -> tuple[dict[str, float], list[np.ndarray]]:
    """Measures of the held-out set, and each layer's counts on it, over all ranks."""
    task.model.eval()
    shares = np.array_split(np.arange(len(task.held_out)), world.size)
    mine, largest = shares[world.rank], len(shares[0])
    with counting(task.model) as found:
        sums: dict[str, Tensor] = {}
        # as many batches on every rank, maybe empty ones, because experts of other ranks wait
        for start in range(0, max(largest, 1), batch_size):
            batch = task.held_out.batch(mine[start : start + batch_size]).to(world.device)
            of_batch = task.evaluate(batch)
            sums = {k: v.to(world.device).double() + sums.get(k, 0.0) for k, v in of_batch.items()}
        totals = world.sum(torch.stack([sums[k] for k in sorted(sums)])).tolist()
        counts = take_counts(found, world)
        for counter, n in zip(found, counts, strict=True):
            counter.counts.copy_(torch.from_numpy(n))
        measures = task.summarize(dict(zip(sorted(sums), totals, strict=True)))
        layers = layers_of(found)
    return measures | usage_metrics(layers, counts, prefix="val/"), counts


def take_counts(counters: Sequence[UsageCounter], world: World) -> list[np.ndarray]:
    """Counts of every layer over all ranks, in one all-reduce; starts a new window."""
    if not counters:
        return []
    counts = [counter.take() for counter in counters]
    total = world.sum(torch.cat(counts)).cpu().numpy()
    return np.split(total, np.cumsum([len(n) for n in counts])[:-1])
