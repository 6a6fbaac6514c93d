"""ZeRO stage 3 under our models: each rank has a share, and what reads a parameter finds it whole.

A language model is built in shares (`core.shares`), which the engine takes over: neither host nor
device has more of it than a rank's share and the pieces at work. A tokenizer, which starts from
what its encoder makes of data, is whole until the engine has it.

DeepSpeed gathers a module's own parameters around its forward pass and drops them after. Blocks and
quantizers read parameters of modules inside them, so each is gathered as one piece; the language
model reads the matrix of its head, which stays from its forward to its backward pass. What reads
parameters elsewhere does so inside `gathered`, which every rank enters together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simvq_moe.core.shares import bring, give_back, is_away, put_away, share_of
from simvq_moe.models.blocks import Block
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.quantizers import AnyQuantizer, Quantized


def gathered(*modules: nn.Module) -> AbstractContextManager[Any]:
    """The parameters of these modules are whole inside, to be read; no more than that below stage
    3, where they always are. Before the engine is made all ranks may set them, too, alike."""
    parameters = [p for module in modules for p in module.parameters()]
    if any(is_away(p) for p in parameters):
        return _brought([p for p in parameters if is_away(p)])
    sharded = [p for p in parameters if is_sharded(p)]
    if not sharded:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters  # only training needs it

    return GatheredParameters(sharded)


@contextmanager
def ready(model: nn.Module) -> Iterator[None]:
    """Inside, methods of the model other than its forward may be called; their modules gather what
    is theirs."""
    read = _read_from_outside(model)
    kept: list[Any] = [p for module in read for p in module.parameters() if is_sharded(p)]
    with gathered(*read):
        for p in kept:
            # as in a forward pass of the model, or their owner's would drop them
            p.ds_active_sub_modules.add(model.ds_id)
        yield
        for p in kept:
            p.ds_active_sub_modules.discard(model.ds_id)


@contextmanager
def in_turn(model: nn.Module) -> Iterator[None]:
    """Inside, before the engine is made, the model can run: each piece is whole while it does."""
    pieces = list(_pieces(model))
    whole: dict[nn.Module, AbstractContextManager[Any]] = {}

    def before(piece: nn.Module, _: Any) -> None:
        whole[piece] = gathered(piece)
        whole[piece].__enter__()

    def after(piece: nn.Module, *_: Any) -> None:
        whole.pop(piece).__exit__(None, None, None)

    hooks = [piece.register_forward_pre_hook(before) for piece in pieces]
    hooks += [piece.register_forward_hook(after) for piece in pieces]
    with gathered(*_read_from_outside(model)):
        yield
    for hook in hooks:
        hook.remove()


def hand_over(model: nn.Module, settings: dict[str, Any]) -> None:
    """Let DeepSpeed have the shares of a model that was built in them, in its precision.

    Args:
        settings: of the engine.
    """
    parameters: list[Any] = list(model.parameters())
    if not any(is_away(p) for p in parameters):
        return
    from deepspeed.runtime.zero import Init

    # given a module, if an empty one, it also makes products keep no gathered weights
    init = Init(module=nn.Module(), config_dict_or_path=settings)
    for p in parameters:
        if is_away(p):
            # what other ranks hold is not read
            bring(p, torch.empty(p.shape, dtype=init.dtype, device=p.device))
            del p.share
        p.data = p.data.to(init.dtype)
        init._convert_to_deepspeed_param(p)
        p.partition()
        give_back()


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a part of this parameter only, by the mark that DeepSpeed leaves."""
    return hasattr(tensor, "ds_id")


def mark_pieces(model: nn.Module) -> None:
    """What is gathered as one; before the engine is made."""
    from deepspeed.utils import set_z3_leaf_module

    for module in model.modules():
        if isinstance(module, Block | AnyQuantizer):
            set_z3_leaf_module(module, True)
        if isinstance(module, AnyQuantizer):
            module.forward = partial(_with_finite_latents, module.forward)


def keep_heads(model: nn.Module) -> None:
    """What the model reads outside of its owner's forward pass; after the engine is made."""
    from deepspeed.runtime.zero import register_external_parameter

    for module in _read_from_outside(model):
        for p in module.parameters():
            register_external_parameter(model, p)


def _pieces(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that are whole at once: those that have parameters away, and no piece in them."""
    if isinstance(module, Block) or any(is_away(p) for p in module.parameters(recurse=False)):
        yield module
        return
    for child in module.children():
        yield from _pieces(child)


@contextmanager
def _brought(away: list[nn.Parameter]) -> Iterator[None]:
    """Parameters are whole inside, by the shares of all ranks."""
    for p in away:
        share = share_of(p)
        assert share is not None
        whole = p.new_empty(share.ranks * len(share.data))
        dist.all_gather(list(whole.chunk(share.ranks)), share.data)
        bring(p, whole[: p.numel()].view(p.shape))
    yield
    for p in away:
        put_away(p)
    give_back()


def _read_from_outside(model: nn.Module) -> list[nn.Module]:
    if not isinstance(model, LanguageModel):
        return []
    return [model.embedding if model.head is None else model.head]


def _with_finite_latents(forward: Any, z: Tensor, mask: Tensor | None = None) -> Quantized:
    """Latents that are not finite make the loss NaN: an error here would leave the other ranks
    waiting for this one's parts of the decoder."""
    out: Quantized = forward(torch.nan_to_num(z, nan=0.0, posinf=0.0, neginf=0.0), mask)
    return out._replace(loss=out.loss + (0 * z).sum().to(out.loss.dtype))
