"""The state of a DeepSpeed engine as whole float32 tensors by name, and back.

ZeRO cuts one flat copy of a group's parameters, and Adam's moments of it, over all ranks; expert
parallelism cuts stacked experts over the ranks of a group. Whole tensors fit any number of ranks,
either ZeRO stage and any such group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from simvq_moe.moe.expert_parallel import ParallelExperts

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every parameter."""


class Whole(NamedTuple):
    """One entry of the model's state dict over all ranks."""

    name: str
    weight: Tensor
    moments: dict[str, Tensor]
    """By `MOMENTS`; empty for what the optimizer does not have."""


def whole_tensors(engine: Any) -> Iterator[Whole]:
    """Every entry of the state dict in its order, one at a time; all ranks go through together."""
    groups = split_tensors(engine.module)
    _link_moments(engine.optimizer)
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        group, moments = groups.get(name), {}
        if _is_trained(tensor):
            weight = safe_get_full_fp32_param(tensor)
            for moment in MOMENTS:
                moments[moment] = gathered(safe_get_full_optimizer_state(tensor, moment), group)
        else:
            weight = tensor.detach().clone()
        yield Whole(name, gathered(weight, group), moments)


def load_tensors(engine: Any, read: Callable[[str, str | None], Tensor]) -> None:
    """Set weights, and Adam's moments at the start of training.

    Args:
        read: the whole tensor of a name: the weight, or a moment of it. Kept on the CPU.
    """
    model, groups = engine.module, split_tensors(engine.module)
    weights = {name: local_part(read(name, None), groups.get(name)) for name in model.state_dict()}
    # with bf16 this rounds as the optimizer does after a step
    model.load_state_dict(weights)
    _make_moments(engine.optimizer)
    for name, p in model.named_parameters():
        if _is_trained(p):
            safe_set_full_fp32_param(p, weights[name].to(p.device))
            for moment in MOMENTS:
                part = local_part(read(name, moment), groups.get(name))
                safe_set_full_optimizer_state(p, part.to(p.device), moment)


def counters(engine: Any) -> dict[str, int]:
    """How far engine, optimizer and schedule have come."""
    zero = engine.optimizer
    state = zero.optimizer.state[zero.single_partition_of_fp32_groups[0]]
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "optimizer_step": int(state["step"]),
        "schedule_step": engine.lr_scheduler.last_epoch,
    }


def load_counters(engine: Any, saved: dict[str, int]) -> None:
    """Go on from there; after `load_tensors`."""
    engine.global_steps = saved["global_steps"]
    engine.global_samples = saved["global_samples"]
    engine.skipped_steps = saved["skipped_steps"]
    for state in engine.optimizer.optimizer.state.values():
        state["step"].fill_(saved["optimizer_step"])
    schedule, done = engine.lr_scheduler, saved["schedule_step"]
    # the rates follow from the step alone, so the schedule takes its last step once more;
    # a count of 1 would make torch warn of a schedule ahead of its optimizer
    schedule.load_state_dict(
        schedule.state_dict() | {"last_epoch": done - 1, "_step_count": done + 1}
    )
    schedule.step()


def split_tensors(model: nn.Module) -> dict[str, Any]:
    """Names in the state dict of what is cut along its first axis, with the group that shares it.

    A frozen base is cut as well, and a buffer carries no mark: so the module is asked.
    """
    split: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, ParallelExperts):
            cut = {
                id(tensor)
                for bank in module.banks
                for tensor in (bank.base, *([] if bank.shared else bank.maps))
            }
            state = module.state_dict(prefix=f"{path}.", keep_vars=True)
            split |= {name: module.group for name, tensor in state.items() if id(tensor) in cut}
    return split


def gathered(part: Tensor | None, group: Any | None) -> Tensor:
    """The whole of a tensor from every rank's part; without a group it is whole already."""
    assert part is not None  # DeepSpeed's word for what it doesn't have
    if group is None:
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


def local_part(whole: Tensor, group: Any | None) -> Tensor:
    """This rank's part: the inverse of `gathered`."""
    if group is None:
        return whole
    return whole.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def _is_trained(tensor: Tensor) -> bool:
    """Whether ZeRO has it, on this rank or another."""
    return hasattr(tensor, "_hp_mapping")


def _make_moments(zero: Any) -> None:
    """The optimizer's state, which torch creates only with the first step."""
    for flat, group in zip(
        zero.single_partition_of_fp32_groups, zero.optimizer.param_groups, strict=True
    ):
        zero.optimizer.state[flat] = {
            "step": torch.zeros((), device=flat.device if group["fused"] else "cpu"),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }
    _link_moments(zero)


def _link_moments(zero: Any) -> None:
    """Let parameters find their moments: DeepSpeed does so once, in the step of the first group,
    when the other groups have none."""
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
