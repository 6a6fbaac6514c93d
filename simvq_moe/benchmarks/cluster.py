"""Measure what predictions need to know of a machine, and hold a prediction against steps on it.

Ranks are processes of this machine, of one thread each on a CPU. All do the same at once, because
neighbours share memory and power, and the slowest counts. Forward and backward of the bare model at
two batch sizes give the share of the peak and what a micro-batch costs without tokens; AdamW alone
the bandwidth of memory; an all-reduce of next to nothing the latency between ranks; an all-reduce
of all gradients and an all-gather of all weights, as ZeRO 1 has them, the bandwidth. Then steps of
a run are measured, beside what `predict` makes of them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import ceil, log2
from statistics import mean, median
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn

from simvq_moe.benchmarks.ranks import on_ranks
from simvq_moe.benchmarks.timing import wall_seconds
from simvq_moe.benchmarks.train import SIDE, check_shape, shape_of, trainer_of
from simvq_moe.config.loading import to_yaml
from simvq_moe.config.schema import Config
from simvq_moe.costs.cluster import Cluster, Prediction, predict
from simvq_moe.costs.rank import ADAM_BYTES, Plan
from simvq_moe.engine.devices import device_peak
from simvq_moe.engine.step_phases import PHASES
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.tasks.registry import build_model
from simvq_moe.text_table import markdown

SMALL = 256
"""Numbers in an all-reduce that is all latency."""
FEWER = 4
"""Times fewer samples in the smaller of both micro-batches."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class MeasuredStep:
    """A step of one shape on so many ranks, measured and predicted."""

    shape: str
    cluster: Cluster
    prediction: Prediction
    step_s: float
    """Wall seconds: the median, of the slowest rank."""
    forward_backward_s: float
    optimizer_s: float
    communication_s: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"prediction": self.prediction.as_dict()}


def bench_cluster(shapes: list[Config], *, ranks: int = 2, rounds: int = 10) -> list[MeasuredStep]:
    """Measure every shape on one rank and on several.

    Raises:
        ConfigError: a shape that can't be trained on so many ranks, or is no language model.
    """
    for config in shapes:
        check_shape(config, "bench cluster")
        samples = config.train.batch_size // config.train.accumulation
        if samples % (ranks * FEWER):
            raise ConfigError(
                f"train.batch_size {config.train.batch_size} / train.accumulation "
                f"{config.train.accumulation} does not divide by --ranks {ranks} x {FEWER} (a "
                f"{FEWER}th of a rank's samples is measured too): use other --ranks, or set "
                "train.batch_size in another --config"
            )
        if config.moe.expert_parallel > 1:
            raise ConfigError(
                f"moe.expert_parallel {config.moe.expert_parallel}: bench cluster measures models "
                "that are whole on a rank: use 1"
            )
    return [_measure(config, size, rounds) for config in shapes for size in sorted({1, ranks})]


def cluster_table(results: list[MeasuredStep]) -> str:
    """A Markdown table of the results."""
    head = ["shape", "ranks", "ms a step", "predicted"]
    rows = [[*head, "forward, backward", "optimizer", "communication"]]
    for r in results:
        p = r.prediction
        pairs = (
            (r.forward_backward_s, p.compute_s),
            (r.optimizer_s, p.optimizer_s),
            (r.communication_s, p.communication_s),
        )
        off = f"{100 * (p.step_s / r.step_s - 1):+.0f} %"
        steps = [f"{1e3 * r.step_s:.1f}", f"{1e3 * p.step_s:.1f} ({off})"]
        parts = [f"{1e3 * found:.1f} ({1e3 * said:.1f})" for found, said in pairs]
        rows.append([r.shape, str(p.gpus), *steps, *parts])
    return f"{markdown(rows, right=range(1, 7))}\n\nIn parentheses: predicted."


def cluster_file(result: MeasuredStep) -> str:
    """YAML for `train --dry-run --cluster`, to be scaled to more machines by hand."""
    return (
        f"# Measured by simvq-moe bench cluster on {result.prediction.gpus} ranks of one machine, "
        f"with {result.shape}.\n"
        "# For more machines set nodes, inter_node_gb_per_s and the latency between them: nothing "
        "left this one.\n" + to_yaml(result.cluster)
    )


def _measure(config: Config, ranks: int, rounds: int) -> MeasuredStep:
    shape = shape_of(config)
    print(f"measuring {shape} on {ranks} rank{'' if ranks == 1 else 's'}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        own = replace(config, runs_dir=folder)
        each = on_ranks(ranks, _on_this_rank, own, rounds)
    # ranks wait for the slowest, but what they wait is no work
    found = {name: (mean if name in PHASES else max)(r[name] for r in each) for name in each[0]}
    model = build_model(config)
    plan = Plan(model, config)
    share = config.train.batch_size // ranks
    rank, parameters = plan.on(ranks, share), sum(p.numel() for p in model.parameters())
    peak = found["peak_flops"]
    at_peak = rank.tokens // config.train.accumulation * rank.flops_per_token / peak
    # a difference of two noisy times can be anything, but nothing is faster than the peak
    slope = max((found["whole"] - found["part"]) / (1 - 1 / FEWER), at_peak)
    rounds_of_all_reduce = 2 * ceil(log2(ranks))
    latency = found["small"] / max(1, rounds_of_all_reduce)
    sent = 3 * 4 * parameters * (ranks - 1) / ranks
    bandwidth = max(1e-3, sent / (found["reduce"] + found["gather"]) / 1e9)
    cluster = Cluster(
        nodes=1,
        gpus_per_node=ranks,
        peak_tflops=peak / 1e12,
        efficiency=at_peak / slope,
        overhead_ms=max(0.0, 1e3 * (found["whole"] - slope)),
        memory_gb=found["memory_gb"],
        memory_gb_per_s=ADAM_BYTES * parameters / found["adam"] / 1e9,
        intra_node_gb_per_s=bandwidth,
        inter_node_gb_per_s=bandwidth,
        latency_us=max(1e-3, 1e6 * latency),
    )
    return MeasuredStep(
        shape=shape,
        cluster=cluster,
        prediction=predict(rank, plan, cluster),
        step_s=found["step"],
        forward_backward_s=found["forward"] + found["backward"],
        optimizer_s=found["optimizer"],
        communication_s=found["communication"],
    )


def _on_this_rank(world: World, config: Config, rounds: int) -> dict[str, float]:
    """Medians in seconds, and what the device has."""
    device, trainer = world.device, trainer_of(config, world)
    model = build_model(config).to(device, DTYPES[config.train.dtype])
    assert isinstance(model, LanguageModel)
    micro_batch = config.train.batch_size // config.train.accumulation // world.size
    parameters = sum(p.numel() for p in model.parameters())
    weights = nn.Parameter(torch.randn(parameters, device=device))
    weights.grad = torch.randn_like(weights)
    adam = torch.optim.AdamW([weights], fused=True)
    small = torch.zeros(SMALL, device=device)
    large = torch.zeros(parameters // world.size * world.size, device=device)
    own = large.chunk(world.size)[world.rank]
    square = torch.randn(SIDE, SIDE, device=device, dtype=DTYPES[config.train.dtype])
    work: dict[str, tuple[Callable[[], Any], int]] = {
        "whole": (_passes(model, micro_batch, device), 1),
        "part": (_passes(model, micro_batch // FEWER, device), FEWER),
        "adam": (adam.step, 2),
        "product": (lambda: square @ square, 4),
        "small": (lambda: dist.all_reduce(small), 20),
        "reduce": (lambda: dist.all_reduce(large), 2),
        "gather": (lambda: dist.all_gather_into_tensor(large, own), 2),
        "step": (trainer.update, 2),
    }
    found: dict[str, list[float]] = {name: [] for name in work}
    with trainer.recorder.phases.collectives_timed():
        for _ in range(rounds + 2):
            for name, (call, times) in work.items():
                world.barrier()
                trainer.recorder.phases.take()
                found[name].append(wall_seconds(call, device.type, times))
                if name == "step":
                    for phase, seconds in trainer.recorder.phases.take().items():
                        found.setdefault(phase, []).append(seconds / times)
    trainer.close()
    medians = {name: median(values[2:]) for name, values in found.items()}
    known = device_peak(device, config.train.dtype)
    return medians | {
        "peak_flops": known or 2 * SIDE**3 / medians["product"],
        "memory_gb": _memory(device, world.size) / 1e9,
    }


def _passes(model: LanguageModel, samples: int, device: torch.device) -> Callable[[], None]:
    """Forward and backward of the bare model."""
    vocabulary = model.embedding.num_embeddings
    tokens = torch.randint(vocabulary, (samples, model.context + 1), device=device)

    def run() -> None:
        loss, _ = model(tokens)
        loss.backward()
        model.zero_grad()

    return run


def _memory(device: torch.device, ranks: int) -> float:
    """Bytes for a rank."""
    if device.type != "cpu":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total / ranks
