"""The optimizer: which parameters learn at which rate, its schedule, and whose AdamW steps.

It is torch's fused kernel, on CPUs and GPUs alike; DeepSpeed's where the optimizer is offloaded
from a GPU. Its FusedAdam would need a compiler, and counts a group's steps at its last parameter.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from simvq_moe.config.schema import Config, OptimizerConfig
from simvq_moe.core.bank import Bank
from simvq_moe.errors import ConfigError
from simvq_moe.moe.routers.base import Router
from simvq_moe.quantizers import Quantizer

logger = logging.getLogger(__name__)

Kernel = Literal["DeepSpeedCPUAdam", "AdamW"]


def make_optimizer(
    groups: list[dict[str, Any]],
    config: OptimizerConfig,
    settings: dict[str, Any],
    device: torch.device,
) -> Optimizer:
    """AdamW over groups that have their rates; the log says whose.

    Args:
        settings: of the engine. With an optimizer offloaded from torch's AdamW they are told so,
            for DeepSpeed would refuse it.
        device: where the model is.
    """
    kernel, why = choose_kernel(settings, device)
    shared: dict[str, Any] = {"lr": config.lr, "betas": config.betas}
    optimizer: Optimizer | None = None
    if kernel != "AdamW":
        from deepspeed.ops import adam

        try:
            optimizer = getattr(adam, kernel)(groups, **shared)  # AdamW is the default mode of both
        except Exception as error:  # a compiler's own, of many kinds
            why = f"{kernel} did not build: {str(error).strip().splitlines()[-1]}"
    if optimizer is None:
        if offloads(settings):
            settings["zero_force_ds_cpu_optimizer"] = False
        optimizer = AdamW(groups, **shared, fused=True)  # also on a CPU, one pass instead of ten
    whose = "torch" if isinstance(optimizer, AdamW) else "DeepSpeed"
    logger.info("optimizer: %s's %s: %s", whose, type(optimizer).__name__, why)
    return optimizer


def choose_kernel(settings: Mapping[str, Any], device: torch.device) -> tuple[Kernel, str]:
    """Which implementation, and why."""
    if device.type != "cuda":
        return "AdamW", "without a GPU DeepSpeed's takes minutes to compile and gains nothing"
    if not offloads(settings):
        return "AdamW", "its fused kernel comes with torch"
    if settings.get("zero_force_ds_cpu_optimizer") is False:
        return "AdamW", "zero_force_ds_cpu_optimizer is false"
    from deepspeed.ops import op_builder

    builders: Any = op_builder  # filled at run time by what the accelerator has
    if not builders.CPUAdamBuilder().is_compatible(verbose=False):
        return "AdamW", "DeepSpeedCPUAdam can't be built here"
    return "DeepSpeedCPUAdam", "the optimizer is offloaded to the CPU"


def offloads(settings: Mapping[str, Any]) -> bool:
    """Whether the optimizer's states lie elsewhere than the model."""
    offload = settings["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def parameter_groups(model: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameters by role: shared maps, routers, codebooks, matrices, and vectors, which never
    decay."""
    role = {id(p): "vector" if p.ndim < 2 else "matrix" for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, Router):
            role |= {
                id(p): "router_vector" if p.ndim < 2 else "router" for p in module.parameters()
            }
        if isinstance(rows := getattr(module, "router_rows", None), nn.Parameter):
            role[id(rows)] = "router"  # of DeepSpeed's own layer
        if isinstance(module, Bank):
            role |= {id(p): "map" for p in module.maps}
    factor = optimizer.codebook_lr_multiplier
    if factor != 1:  # without it the order of parameters, and so of checkpoints, stays
        for module in model.modules():
            if isinstance(module, Quantizer):
                own = {id(p) for p in module.parameters()}
                role |= {i: f"codebook_{role[i]}" for i in own if i in role}
    settings = {
        "matrix": (1.0, optimizer.weight_decay),
        "vector": (1.0, 0.0),
        "router": (optimizer.router_lr_multiplier, optimizer.weight_decay),
        "router_vector": (optimizer.router_lr_multiplier, 0.0),
        "map": (optimizer.map_lr_multiplier, 0.0),
        "codebook_matrix": (factor, optimizer.weight_decay),
        "codebook_vector": (factor, 0.0),
        "codebook_map": (factor * optimizer.map_lr_multiplier, 0.0),
    }
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, (multiplier, decay) in settings.items():
        members = [p for p in model.parameters() if role[id(p)] == name and p.requires_grad]
        lr = optimizer.lr * multiplier
        for p in members:
            muon = name == "router" and p.ndim == 2 and optimizer.router == "muon"
            # one group where nothing differs, because every group costs its own collectives a step
            group = {"name": name, "params": [], "lr": lr, "weight_decay": decay, "muon": muon}
            groups.setdefault((lr, decay, muon), group)["params"].append(p)
    if optimizer.router == "muon" and not any(group["muon"] for group in groups.values()):
        raise ConfigError(
            "optimizer.router 'muon' without a matrix that a router learns: use 'adamw', or "
            "another moe.router.kind"
        )
    return list(groups.values())


def learning_rate_factor(step: int, steps: int, optimizer: OptimizerConfig) -> float:
    """Factor on the peak rate for the update after `step` updates: linear warm-up, then cosine."""
    if step < optimizer.warmup_steps:
        return (step + 1) / optimizer.warmup_steps
    span = max(1, steps - 1 - optimizer.warmup_steps)
    done = min(1.0, (step - optimizer.warmup_steps) / span)
    floor = optimizer.final_lr_ratio
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


def make_schedule(optimizer: Optimizer, config: Config) -> LambdaLR:
    """The schedule of the config's learning rate over its steps."""
    return LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, config.train.steps, config.optimizer),
    )
