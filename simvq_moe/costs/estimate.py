"""What a run would cost, without starting it: as text for people and as a dictionary for JSON."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import nn

from simvq_moe.config.loading import changed
from simvq_moe.config.schema import Config, on_one_rank
from simvq_moe.costs.cluster import Cluster, predictions, table
from simvq_moe.costs.flops import parameter_counts
from simvq_moe.costs.rank import Plan, RankCosts
from simvq_moe.errors import ConfigError
from simvq_moe.tasks.registry import task_of

TITLES = {
    "same_global_batch": "the global batch of the config, on numbers of GPUs that it divides over",
    "same_batch_per_gpu": "as many samples on each GPU as in the last line of that table",
}


def estimate(config: Config, ranks: int, cluster: Cluster | None) -> tuple[str, dict[str, Any]]:
    """Costs of a rank of so many, and predictions for a cluster.

    A language model is only described and not built, so any size can be asked for.

    Raises:
        ConfigError: a tokenizer, which is counted on samples, is too large for this machine.
    """
    task = task_of(config)
    counted = task.without_networks(config) if task.lacks_networks(config) else config
    with torch.device("meta"):  # where no weights can be loaded
        model = task.build_model(on_one_rank(task.without_networks(config)))
    sample = task.counted_sample(config)
    if sample is not None:
        _check_countable(config, model, sample.numbers)
        model = task.build_model(on_one_rank(counted))
    plan = Plan(model, config)
    rank = plan.on(ranks, config.train.batch_size // ranks)
    parameters = parameter_counts(model)
    found: dict[str, Any] = {
        "parameters": parameters,
        "flops_per_token": round(rank.flops_per_token),
        "per_rank": rank.as_dict(),
    }
    micro_batch = config.train.batch_size // (ranks * config.train.accumulation)
    text = _describe(parameters, rank, micro_batch)
    if counted != config:
        text += "\n! without the costs of LPIPS, whose network is not here"
    if cluster is not None:
        scalings = predictions(plan, cluster)
        found["predictions"] = {k: [p.as_dict() for p in rows] for k, rows in scalings.items()}
        for name, rows in scalings.items():
            text += f"\n\npredicted, {TITLES[name]}:\n{table(rows, cluster)}"
        if any(
            p.memory_bytes > cluster.memory_gb * 1e9 for rows in scalings.values() for p in rows
        ):
            text += f"\n! more than the {cluster.memory_gb:g} GB of a GPU"
    return text, found


def _check_countable(config: Config, model: nn.Module, numbers: int) -> None:
    """Raise `ConfigError` where two samples do not go through a model on this machine.

    Weights, gradients and a copy; and a rough count of what a pass makes. Computed in integers,
    because sizes may be anything that fits into a config.

    Args:
        numbers: that a pass makes of a sample.
    """
    weights = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    needed, free = 4 * (3 * weights + 2 * numbers), psutil.virtual_memory().available
    if needed <= free:
        return
    sections = ("data", *task_of(config).sections)
    sizes = [
        f"{key} {value}"
        for key, value in changed(config).items()
        if key.partition(".")[0] in sections
    ]
    raise ConfigError(
        f"{', '.join(sizes)}: counting its costs takes about {needed / 1e9:,.0f} GB, and "
        f"{free / 1e9:,.0f} are free here: make it smaller"
    )


def _describe(parameters: dict[str, int], rank: RankCosts, micro_batch: int) -> str:
    sizes = {
        "weights": rank.parameter_bytes,
        "gradients": rank.gradient_bytes,
        "optimizer": rank.optimizer_bytes,
        "activations": rank.activation_bytes,
    }
    sent = {
        "gradients and weights": rank.dense_bytes + rank.expert_bytes,
        "all-to-all": rank.exchange_bytes,
    }
    return "\n".join(
        [
            f"{parameters['total']:,} parameters, {parameters['active']:,} of them for a token; "
            f"{rank.flops_per_token:,.0f} FLOPs a token in micro-batches of {micro_batch}, "
            f"{rank.tokens * rank.ranks:,} tokens a step",
            f"each of {rank.ranks} rank{'' if rank.ranks == 1 else 's'} holds {_sizes(sizes)}, "
            f"at most {_size(rank.memory_bytes)} at once"
            + (f", and a copy of {_size(rank.save_bytes)} on the host" if rank.save_bytes else ""),
            f"each sends {_sizes(sent)} a step",
        ]
    )


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{_size(size)} {name}" for name, size in sizes.items())


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
