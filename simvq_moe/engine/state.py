"""The counters of a DeepSpeed engine, and Adam's moments, which it makes with its first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every parameter."""
OF_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic scale of the loss changes."""


def counters(engine: Any) -> dict[str, Any]:
    """How far engine, optimizer, schedule and, with fp16, the scale of the loss have come."""
    states = adam(engine).state
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "optimizer_step": int(states[trained_tensors(engine)[0]]["step"]),
        "schedule_step": engine.lr_scheduler.last_epoch,
        "loss_scale": _loss_scale(engine),
    }


def load_counters(engine: Any, saved: dict[str, Any]) -> None:
    """Go on from there; after the moments."""
    engine.global_steps = saved["global_steps"]
    engine.global_samples = saved["global_samples"]
    engine.skipped_steps = saved["skipped_steps"]
    for state in adam(engine).state.values():
        if isinstance(state["step"], Tensor):
            state["step"].fill_(saved["optimizer_step"])
        else:
            state["step"] = saved["optimizer_step"]
    if engine.fp16_enabled():
        vars(engine.optimizer.loss_scaler).update(saved["loss_scale"])
    schedule, done = engine.lr_scheduler, saved["schedule_step"]
    # the rates follow from the step alone, so the schedule takes its last step once more;
    # a count of 1 would make torch warn of a schedule ahead of its optimizer
    schedule.load_state_dict(
        schedule.state_dict() | {"last_epoch": done - 1, "_step_count": done + 1}
    )
    schedule.step()


def _loss_scale(engine: Any) -> dict[str, float]:
    if not engine.fp16_enabled():
        return {}
    return {name: vars(engine.optimizer.loss_scaler)[name] for name in OF_LOSS_SCALE}


def adam(engine: Any) -> torch.optim.Optimizer:
    """The optimizer itself, which ZeRO wraps."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def trained_tensors(engine: Any) -> list[Tensor]:
    """What Adam steps: parameters, or flat fp32 copies of this rank's share of them."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [p for p in engine.module.parameters() if p.requires_grad]
    if stage == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def make_moments(engine: Any) -> None:
    """The optimizer's state, which is otherwise created with the first step."""
    optimizer = adam(engine)
    for tensor in trained_tensors(engine):
        optimizer.state[tensor] = first_state(optimizer, tensor)
    link_moments(engine)


def first_state(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Any]:
    """What Adam remembers of a tensor before its first step."""
    return {
        "step": _start_of_steps(optimizer, tensor.device),
        **{moment: torch.zeros_like(tensor) for moment in MOMENTS},
    }


def _start_of_steps(optimizer: torch.optim.Optimizer, device: torch.device) -> Tensor | int:
    """0 in the form that the optimizer counts in: torch's in a tensor, DeepSpeed's in a number."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return 0
    return torch.zeros((), device=device if optimizer.defaults["fused"] else "cpu")


def link_moments(engine: Any) -> None:
    """At stages 1 and 2 let parameters find their moments: DeepSpeed does so once, in the step of
    the first group, when the other groups have none."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
