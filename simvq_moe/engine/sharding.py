"""ZeRO stage 3 under our models: whatever reads a parameter finds it whole.

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
from torch import Tensor, nn

from simvq_moe.models.blocks import Block
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.quantizers import AnyQuantizer, Quantized


def gathered(*modules: nn.Module) -> AbstractContextManager[Any]:
    """The parameters of these modules are whole inside, to be read; no more than that below stage
    3, where they always are."""
    sharded = [p for module in modules for p in module.parameters() if is_sharded(p)]
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


def _read_from_outside(model: nn.Module) -> list[nn.Module]:
    if not isinstance(model, LanguageModel):
        return []
    return [model.embedding if model.head is None else model.head]


def _with_finite_latents(forward: Any, z: Tensor, mask: Tensor | None = None) -> Quantized:
    """Latents that are not finite make the loss NaN: an error here would leave the other ranks
    waiting for this one's parts of the decoder."""
    out: Quantized = forward(torch.nan_to_num(z, nan=0.0, posinf=0.0, neginf=0.0), mask)
    return out._replace(loss=out.loss + (0 * z).sum().to(out.loss.dtype))
