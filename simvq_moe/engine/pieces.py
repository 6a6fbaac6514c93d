"""What this rank holds of the state of a DeepSpeed engine: pieces of flattened tensors.

ZeRO cuts one flat copy of a group's parameters, and Adam's moments of it, over all ranks, stage 3
each parameter as well; expert parallelism cuts stacked experts along their first axis. Whatever the
cut, a rank holds consecutive elements of each flattened tensor, so nothing is gathered: pieces are
live views, written where they lie and read into where they lie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simvq_moe.engine.sharding import is_sharded
from simvq_moe.engine.state import MOMENTS, adam, link_moments, make_moments
from simvq_moe.moe.expert_parallel import ParallelExperts

LEAST_SHARE = 2**13
"""Bytes of what several ranks hold that one of them writes at least, if there are so many."""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of one tensor of the state dict, or of one moment of it."""

    key: str
    """The name in the state dict; of a moment MOMENT/NAME."""
    start: int
    """Where the elements begin in the whole tensor, flattened."""
    data: Tensor
    """The elements, in one dimension: a view of what the engine holds."""
    shape: tuple[int, ...]
    """Shape of the whole tensor over all ranks."""
    place: int = 0
    """This rank's number among those with the same elements."""
    holders: int = 1
    """Number of ranks with the same elements."""


def held_pieces(engine: Any) -> list[Piece]:
    """Everything of the engine's state that this rank holds; the moments are made if need be."""
    if adam(engine).state:
        link_moments(engine)
    else:
        # at the start of training, or every step so far was skipped
        make_moments(engine)
    groups = _groups_of_split(engine.module)
    state = engine.module.state_dict(keep_vars=True)
    return [p for name, tensor in state.items() for p in _held(engine, name, tensor, groups)]


def own_share(pieces: Iterable[Piece], least: int = LEAST_SHARE) -> list[Piece]:
    """What this rank writes: of elements that several ranks hold an even part of the bytes, so that
    over all ranks every element is written once.

    Args:
        least: bytes that are not split further, because whoever needs them would open many files.
    """
    pieces = list(pieces)
    total: Counter[tuple[int, int]] = Counter()
    for piece in pieces:
        total[piece.place, piece.holders] += piece.data.nbytes
    begun: Counter[tuple[int, int]] = Counter()
    share = []
    for piece in pieces:
        which = piece.place, piece.holders
        parts = min(piece.holders, max(total[which] // least, 1))
        cuts = (total[which] * min(k, parts) // parts for k in (piece.place, piece.place + 1))
        begin, end = (_elements_before(cut - begun[which], piece.data) for cut in cuts)
        begun[which] += piece.data.nbytes
        if begin < end or (not len(piece.data) and not piece.place):
            data = piece.data[begin:end]
            share.append(replace(piece, start=piece.start + begin, data=data, place=0, holders=1))
    return share


def _elements_before(cut: int, data: Tensor) -> int:
    """How many elements begin before a byte."""
    return min(max(-(-cut // data.itemsize), 0), len(data))


def took_up(engine: Any) -> None:
    """Let the model compute with what was read into `held_pieces`; all ranks call it together."""
    model, stage = engine.module, engine.zero_optimization_stage()
    if stage in (1, 2):
        # with bf16 this rounds as the optimizer does after a step
        engine.optimizer.update_lp_params()
    elif stage == 3:
        _update_shards(engine)
    # modules note what was loaded, such as that a codebook has started
    state = model.state_dict(keep_vars=True)
    whole = {name: tensor.detach() for name, tensor in state.items() if not is_sharded(tensor)}
    model.load_state_dict(whole, strict=len(whole) == len(state))


def _held(engine: Any, name: str, tensor: Any, groups: dict[str, Any]) -> Iterator[Piece]:
    stage, group = engine.zero_optimization_stage(), groups.get(name)
    parts = 1 if group is None else dist.get_world_size(group)
    moments = (None, *MOMENTS) if tensor.requires_grad else (None,)
    if is_sharded(tensor):
        size, rank = tensor.ds_tensor.numel(), dist.get_rank(tensor.ds_process_group)
        # DeepSpeed fills the last shards up
        length = min(max(tensor.ds_numel - rank * size, 0), size)
        for moment in moments if length else ():
            data = _shard(engine, tensor, moment).narrow(0, 0, length)
            yield Piece(_key(name, moment), rank * size, data, tuple(tensor.ds_shape))
        return
    before = 0 if group is None else dist.get_rank(group) * tensor.numel()
    shape = tuple(tensor.shape)
    shape = shape if group is None else (shape[0] * parts, *shape[1:])
    if stage == 0 or not tensor.requires_grad:
        whole = Piece(name, before, tensor.detach().view(-1), shape)
        whole = replace(
            whole, place=dist.get_rank() // parts, holders=dist.get_world_size() // parts
        )
        yield whole
        for moment in moments[1:]:
            data = engine.optimizer.state[tensor][moment].view(-1)
            yield replace(whole, key=_key(name, moment), data=data)
    elif tensor._hp_mapping is not None:
        start = before + tensor._hp_mapping.lp_fragment_address.start
        for moment in moments:
            data = tensor._hp_mapping.get_hp_fragment(moment)
            yield Piece(_key(name, moment), start, data.detach(), shape)


def _key(name: str, moment: str | None) -> str:
    return name if moment is None else f"{moment}/{name}"


def _groups_of_split(model: nn.Module) -> dict[str, Any]:
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


def _shard(engine: Any, p: Any, moment: str | None) -> Tensor:
    """This rank's part of a parameter at stage 3, filled up, in float32 if it is learned."""
    if not p.requires_grad:
        return p.ds_tensor.detach()
    optimizer = engine.optimizer
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
    flat = optimizer.fp32_partitioned_groups_flat[group]
    found = flat.detach() if moment is None else optimizer.optimizer.state[flat][moment]
    return found.narrow(0, offset, size)


@torch.no_grad()
def _update_shards(engine: Any) -> None:
    """Make a rank's shards at stage 3 in the model's precision, and what it keeps whole."""
    for p in engine.module.parameters():
        if is_sharded(p) and p.requires_grad:
            p.ds_tensor.copy_(_shard(engine, p, None))
    kept = engine.optimizer.persistent_parameters
    if kept:
        kept[0].partition(kept)
        kept[0].all_gather(kept)
