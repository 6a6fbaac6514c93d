"""The state of a DeepSpeed engine as whole float32 tensors by name, and back.

ZeRO cuts one flat copy of a group's parameters, and Adam's moments of it, over all ranks, stage 3
each parameter as well; expert parallelism cuts stacked experts over the ranks of a group. Whole
tensors fit any number of ranks, any ZeRO stage and any such group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from simvq_moe.engine.sharding import is_sharded
from simvq_moe.moe.expert_parallel import ParallelExperts

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every parameter."""
OF_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic scale of the loss changes."""


class Whole(NamedTuple):
    """One entry of the model's state dict over all ranks."""

    name: str
    weight: Tensor
    moments: dict[str, Tensor]
    """By `MOMENTS`; empty for what the optimizer does not have."""


def whole_tensors(engine: Any) -> Iterator[Whole]:
    """Every entry of the state dict in its order, one at a time; all ranks go through together."""
    groups = split_tensors(engine.module)
    if _adam(engine).state:
        _link_moments(engine)
    else:
        # every step so far was skipped
        _make_moments(engine)
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        group, moments = groups.get(name), {}
        if not tensor.requires_grad:
            with GatheredParameters(tensor, enabled=is_sharded(tensor)):
                weight = tensor.detach().clone()
        elif engine.zero_optimization_stage() == 0:
            weight = tensor.detach().clone()
            moments = {moment: engine.optimizer.state[tensor][moment] for moment in MOMENTS}
        else:
            weight = safe_get_full_fp32_param(tensor)
            for moment in MOMENTS:
                moments[moment] = gathered(safe_get_full_optimizer_state(tensor, moment), group)
        yield Whole(name, gathered(weight, group), moments)


def load_tensors(engine: Any, read: Callable[[str, str | None], Tensor]) -> None:
    """Set weights, and Adam's moments at the start of training.

    Args:
        read: the whole tensor of a name: the weight, or a moment of it. Kept on the CPU.
    """
    model, groups = engine.module, split_tensors(engine.module)
    weights = {name: local_part(read(name, None), groups.get(name)) for name in model.state_dict()}
    sharded = {name for name, p in model.named_parameters() if is_sharded(p)}
    whole = {name: weight for name, weight in weights.items() if name not in sharded}
    # with bf16 this rounds as the optimizer does after a step
    model.load_state_dict(whole, strict=not sharded)
    _make_moments(engine)
    for name, p in model.named_parameters():
        weight = weights[name].to(p.device)
        if name in sharded:
            with GatheredParameters(p, modifier_rank=0), torch.no_grad():
                p.copy_(weight)
        if p.requires_grad:
            parts = {moment: local_part(read(name, moment), groups.get(name)) for moment in MOMENTS}
            _load_into_optimizer(engine, p, weight, parts)


def _load_into_optimizer(
    engine: Any, p: nn.Parameter, weight: Tensor, parts: dict[str, Tensor]
) -> None:
    stage = engine.zero_optimization_stage()
    if stage == 3:
        safe_set_local_fp32_param(p, _own_shard(p, weight))
    elif stage > 0:
        safe_set_full_fp32_param(p, weight)
    for moment, part in parts.items():
        part = part.to(p.device)
        if stage == 0:
            engine.optimizer.state[p][moment].copy_(part)
        elif stage == 3:
            safe_set_local_optimizer_state(p, _own_shard(p, part), moment)
        else:
            safe_set_full_optimizer_state(p, part, moment)


def _own_shard(p: Any, whole: Tensor) -> Tensor:
    """This rank's shard of a parameter; DeepSpeed fills the last one up with zeros.

    Its own `safe_set_full_fp32_param` fails where there is something to fill.
    """
    size, rank = p.ds_tensor.numel(), dist.get_rank(p.ds_process_group)
    shard = whole.flatten()[rank * size : (rank + 1) * size]
    return F.pad(shard, (0, size - len(shard)))


def counters(engine: Any) -> dict[str, Any]:
    """How far engine, optimizer, schedule and, with fp16, the scale of the loss have come."""
    states = _adam(engine).state
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "optimizer_step": int(states[_trained_tensors(engine)[0]]["step"]),
        "schedule_step": engine.lr_scheduler.last_epoch,
        "loss_scale": _loss_scale(engine),
    }


def load_counters(engine: Any, saved: dict[str, Any]) -> None:
    """Go on from there; after `load_tensors`."""
    engine.global_steps = saved["global_steps"]
    engine.global_samples = saved["global_samples"]
    engine.skipped_steps = saved["skipped_steps"]
    for state in _adam(engine).state.values():
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


def _loss_scale(engine: Any) -> dict[str, float]:
    if not engine.fp16_enabled():
        return {}
    return {name: vars(engine.optimizer.loss_scaler)[name] for name in OF_LOSS_SCALE}


def _adam(engine: Any) -> torch.optim.Optimizer:
    """The optimizer itself, which ZeRO wraps."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def _trained_tensors(engine: Any) -> list[Tensor]:
    """What Adam steps: parameters, or flat fp32 copies of this rank's share of them."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [p for p in engine.module.parameters() if p.requires_grad]
    if stage == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def _make_moments(engine: Any) -> None:
    """The optimizer's state, which is otherwise created with the first step."""
    adam = _adam(engine)
    for tensor in _trained_tensors(engine):
        adam.state[tensor] = {
            "step": _start_of_steps(adam, tensor.device),
            **{moment: torch.zeros_like(tensor) for moment in MOMENTS},
        }
    _link_moments(engine)


def _start_of_steps(adam: torch.optim.Optimizer, device: torch.device) -> Tensor | int:
    """0 in the form that the optimizer counts in: torch's in a tensor, DeepSpeed's in a number."""
    if not isinstance(adam, torch.optim.AdamW):
        return 0
    return torch.zeros((), device=device if adam.defaults["fused"] else "cpu")


def _link_moments(engine: Any) -> None:
    """At stages 1 and 2 let parameters find their moments: DeepSpeed does so once, in the step of
    the first group, when the other groups have none."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
