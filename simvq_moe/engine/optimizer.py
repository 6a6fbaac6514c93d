"""AdamW of whoever has the faster kernel here: DeepSpeed on a GPU where its builds, else torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch.optim import AdamW, Optimizer

from simvq_moe.config.schema import OptimizerConfig

logger = logging.getLogger(__name__)

Kernel = Literal["FusedAdam", "DeepSpeedCPUAdam", "AdamW"]


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
    from deepspeed.ops import op_builder

    builders: Any = op_builder  # filled at run time by what the accelerator has
    if offloads(settings):
        if settings.get("zero_force_ds_cpu_optimizer") is False:
            return "AdamW", "zero_force_ds_cpu_optimizer is false"
        if not builders.CPUAdamBuilder().is_compatible(verbose=False):
            return "AdamW", "DeepSpeedCPUAdam can't be built here"
        return "DeepSpeedCPUAdam", "the optimizer is offloaded to the CPU"
    if not builders.FusedAdamBuilder().is_compatible(verbose=False):
        return "AdamW", "FusedAdam can't be built here"
    return "FusedAdam", "it builds here"


def offloads(settings: Mapping[str, Any]) -> bool:
    """Whether the optimizer's states lie elsewhere than the model."""
    offload = settings["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"
