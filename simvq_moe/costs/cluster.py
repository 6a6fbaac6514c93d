"""Predict the step of a run on machines that are not here: time, throughput, MFU, up to thousands
of GPUs.

A step is the sum of matrix products at a share of the peak, of what a micro-batch costs however
small, of the optimizer's passes over memory, and of communication, without overlap, which is how
our settings run DeepSpeed. Communication follows the latency-bandwidth model (Thakur, Rabenseifner
and Gropp, 2005, table 1): n ranks reduce or gather in log2 n rounds, E ranks exchange in E - 1.
What crosses nodes shares the node's network.

`simvq-moe bench cluster` measures these numbers. Not modelled: elementwise work beyond what
`efficiency` says, waiting for data, ranks of different speed, uneven experts, and congestion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil, log2
from pathlib import Path
from typing import Any

from simvq_moe import text_table
from simvq_moe.config.loading import merge_files
from simvq_moe.config.schema import Config
from simvq_moe.costs.rank import Plan, RankCosts
from simvq_moe.errors import ConfigError

LARGEST = 10**9
"""The largest number that a cluster may have for anything."""


@dataclass(frozen=True)
class Cluster:
    """Machines of one kind."""

    nodes: int
    """Number of machines."""
    gpus_per_node: int
    """Number of GPUs in each machine."""
    peak_tflops: float
    """1e12 floating-point operations a second that one GPU does at best, in train.dtype."""
    efficiency: float
    """Share of the peak that forward and backward reach on one GPU beyond `overhead_ms`, while its
    neighbours work as well."""
    overhead_ms: float
    """Milliseconds that a micro-batch takes however few its tokens are: kernel launches, Python."""
    memory_gb: float
    """Memory of one GPU, in 1e9 bytes."""
    memory_gb_per_s: float
    """1e9 bytes a second that one GPU reads from or writes to its memory."""
    intra_node_gb_per_s: float
    """1e9 bytes a second that one GPU sends to the others within its node."""
    inter_node_gb_per_s: float
    """1e9 bytes a second that one node sends to the others, over all its adapters."""
    latency_us: float
    """Microseconds that a message of no bytes takes."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Prediction:
    """One step on so many GPUs."""

    gpus: int
    tokens_per_step: int
    compute_s: float
    optimizer_s: float
    communication_s: float
    tokens_per_s: float
    mfu: float
    """Share of the peak of all GPUs that goes into the model's FLOPs."""
    memory_bytes: int
    """Bytes that a rank needs of its GPU."""

    @property
    def step_s(self) -> float:
        return self.compute_s + self.optimizer_s + self.communication_s

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"step_s": self.step_s}


def read_cluster(file: Path) -> Cluster:
    """The cluster that a YAML file describes.

    Raises:
        ConfigError: there is no file, or a key is missing, unknown or not positive.
    """
    if not file.is_file():
        raise ConfigError(
            f"--cluster {file} is no file: give YAML, such as that in configs/clusters/"
        )
    cluster = merge_files(Cluster, [file])
    for field in fields(cluster):
        value = getattr(cluster, field.name)
        if not (value > 0 or (value == 0 and field.name == "overhead_ms")):
            raise ConfigError(f"{file}: {field.name} {value}: use more than 0")
        if value > LARGEST:
            raise ConfigError(f"{file}: {field.name} {value} > {LARGEST:,}: use at most that")
    if cluster.efficiency > 1:
        raise ConfigError(f"{file}: efficiency {cluster.efficiency} > 1: it is a share of the peak")
    return cluster


def gpu_counts(cluster: Cluster) -> list[int]:
    """One GPU, one node, and eight times as many again up to all of them."""
    counts, number = {1, cluster.gpus}, cluster.gpus_per_node
    while number < cluster.gpus:
        counts.add(number)
        number *= 8
    return sorted(counts)


def predict(rank: RankCosts, plan: Plan, cluster: Cluster) -> Prediction:
    """The step of a run whose ranks are all like this one, a GPU each."""
    parallel = plan.config.moe.expert_parallel
    again = 4 / 3 if plan.config.train.activation_checkpointing else 1.0
    peak = cluster.peak_tflops * 1e12
    work = rank.tokens * rank.flops_per_token
    passes = plan.config.train.accumulation * again
    compute = work * again / (peak * cluster.efficiency) + passes * cluster.overhead_ms * 1e-3
    optimizer = rank.update_bytes / (cluster.memory_gb_per_s * 1e9)
    communication = (
        rank.dense_bytes / _bandwidth(cluster, rank.ranks, 1)
        + rank.expert_bytes / _bandwidth(cluster, rank.ranks, parallel)
        + _exchange_seconds(cluster, rank.exchange_bytes, parallel)
    )
    rounds = rank.reductions * 2 * ceil(log2(rank.ranks)) + rank.exchanges * (parallel - 1)
    communication += rounds * cluster.latency_us * 1e-6
    step = compute + optimizer + communication
    return Prediction(
        gpus=rank.ranks,
        tokens_per_step=rank.tokens * rank.ranks,
        compute_s=compute,
        optimizer_s=optimizer,
        communication_s=communication,
        tokens_per_s=rank.tokens * rank.ranks / step,
        mfu=work / (peak * step),
        memory_bytes=rank.memory_bytes,
    )


def fitting_gpus(config: Config, cluster: Cluster) -> list[int]:
    """Those of `gpu_counts` over which the global batch and the experts divide.

    Raises:
        ConfigError: there are none.
    """
    train, moe = config.train, config.moe
    counts = [n for n in gpu_counts(cluster) if n % moe.expert_parallel == 0]
    fitting = [n for n in counts if train.batch_size % (n * train.accumulation) == 0]
    if not fitting:
        raise ConfigError(
            f"train.batch_size {train.batch_size} with train.accumulation {train.accumulation} and "
            f"moe.expert_parallel {moe.expert_parallel} runs on none of {gpu_counts(cluster)} GPUs:"
            " change one of them"
        )
    return fitting


def predictions(plan: Plan, cluster: Cluster) -> dict[str, list[Prediction]]:
    """Two scalings: the config's global batch, and as many samples a GPU as that leaves on most."""
    batch, parallel = plan.config.train.batch_size, plan.config.moe.expert_parallel
    fitting = fitting_gpus(plan.config, cluster)
    counts = [n for n in gpu_counts(cluster) if n % parallel == 0]
    scalings = {
        "same_global_batch": [(n, batch // n) for n in fitting],
        "same_batch_per_gpu": [(n, batch // fitting[-1]) for n in counts],
    }
    return {
        name: [predict(plan.on(n, samples), plan, cluster) for n, samples in sizes]
        for name, sizes in scalings.items()
    }


def table(rows: Sequence[Prediction], cluster: Cluster) -> str:
    """Aligned text, one line for each number of GPUs."""
    head = ("GPUs", "tokens/step", "GB/GPU", "compute ms", "optimizer ms", "communication ms")
    lines: list[tuple[str, ...]] = [(*head, "step ms", "tokens/s", "MFU")]
    for row in rows:
        full = "!" if row.memory_bytes > cluster.memory_gb * 1e9 else ""
        seconds = (row.compute_s, row.optimizer_s, row.communication_s, row.step_s)
        lines.append(
            (
                f"{row.gpus:,}",
                f"{row.tokens_per_step:,}",
                f"{row.memory_bytes / 1e9:.1f}{full}",
                *(f"{1e3 * s:,.2f}" for s in seconds),
                f"{row.tokens_per_s:,.0f}",
                f"{100 * row.mfu:.1f} %",
            )
        )
    return text_table.columns(lines)


def _bandwidth(cluster: Cluster, ranks: int, parallel: int) -> float:
    """Bytes a second of a rank in a ring over every `parallel`-th of all ranks."""
    inside = cluster.intra_node_gb_per_s * 1e9
    if ranks <= cluster.gpus_per_node:
        return inside
    # a ring of neighbours enters a node once; one of every E-th rank shares the way with E - 1 more
    rings = min(parallel, cluster.gpus_per_node)
    return min(inside, cluster.inter_node_gb_per_s * 1e9 / rings)


def _exchange_seconds(cluster: Cluster, sent: int, parallel: int) -> float:
    """Seconds that each of `parallel` neighbouring ranks takes to send all others as much."""
    inside = min(parallel, cluster.gpus_per_node)
    outside = (parallel - inside) / max(1, parallel - 1)
    within = sent * (1 - outside) / (cluster.intra_node_gb_per_s * 1e9)
    across = sent * outside * cluster.gpus_per_node / (cluster.inter_node_gb_per_s * 1e9)
    return max(within, across)
