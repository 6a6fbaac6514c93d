"""Usage meters in the mixture-of-experts models of `transformers`: how often each expert is chosen.

A meter counts what the experts of a block are given, which is the same in every architecture; a
token that the attention mask calls padding is routed like others and is not counted. Nothing of the
model changes but its hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from simvq_moe.core.collectives import total
from simvq_moe.core.usage import Usage, UsageCounter, usage

METERS = "usage_meters"
"""The attribute of a model that holds its meters."""


class Mask:
    """The attention mask of the forward pass that is under way."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def begin(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        del model
        found = named.get("attention_mask", args[1] if len(args) > 1 else None)
        self.mask = found if isinstance(found, Tensor) and found.ndim == 2 else None

    def end(self, *_: Any) -> None:
        self.mask = None

    def of(self, tokens: int) -> Bool[Tensor, " tokens"] | None:
        """Which tokens are none of padding; None: all.

        With a cache of keys the mask also covers the tokens before these.
        """
        if self.mask is None or tokens % len(self.mask):
            return None
        each = tokens // len(self.mask)
        if each > self.mask.shape[1]:
            return None
        return self.mask[:, self.mask.shape[1] - each :].reshape(-1) != 0


class Meter(nn.Module):
    """The counter of one block, and the hook by which it sees what the experts are given.

    Args:
        experts: the module that holds the block's experts.
        top_k: experts of a token.
        mask: of the model.
    """

    def __init__(self, experts: nn.Module, top_k: int, mask: Mask) -> None:
        super().__init__()
        slots = experts.num_experts
        assert isinstance(slots, int)
        self.mask = mask
        self.counter = UsageCounter(slots, kind="experts", top_k=top_k)
        self.counter.to(next(experts.parameters()).device)
        self.hook = experts.register_forward_pre_hook(self.count)

    def count(self, experts: nn.Module, args: tuple[Any, ...]) -> None:
        del experts
        ids: Int[Tensor, "tokens top_k"] = args[1]
        real = self.mask.of(len(ids))
        # what stands beyond the last expert is with another rank
        counted = ids < self.counter.slots
        if real is not None:
            counted = counted & real.to(ids.device)[:, None]
        self.counter.add(torch.where(counted, ids, -1))


class Meters(nn.ModuleList):
    """All meters of a model, first layer first, and its hooks that see the mask."""

    def __init__(self, model: nn.Module, top_k: int) -> None:
        # whoever has such a model has imported it; names of this package come without it
        from transformers import PreTrainedModel

        mask = Mask()
        blocks = expert_modules(model).values()
        super().__init__(Meter(experts, top_k, mask) for experts in blocks)
        self.hooks = []
        for module in [*model.modules()]:
            if isinstance(module, PreTrainedModel):
                before = module.register_forward_pre_hook(mask.begin, with_kwargs=True)
                after = module.register_forward_hook(mask.end, always_call=True)
                self.hooks += [before, after]

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for hook in (*self.hooks, *(meter.hook for meter in self if isinstance(meter, Meter))):
            hook.remove()


def meter(model: nn.Module) -> None:
    """Count how often each expert of a model is chosen, from now on.

    It counts in training, and in evaluation inside `core.usage.counting(model)`; what activation
    checkpointing runs again is counted once. `usage_by_layer` gives the measures. A model that is
    metered already stays as it is; `unmeter` takes the meters out.

    Args:
        model: any of `transformers` whose blocks hold `experts`, such as Mixtral, OLMoE, Qwen3-MoE,
            DeepSeek-V3, GLM-4-MoE and gpt-oss.

    Raises:
        ValueError: it has no such block, or experts that are split over ranks.
    """
    if getattr(model, METERS, None) is not None:
        return
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(
            f"the experts of this {type(model).__name__} are split over ranks: use a model with "
            "whole weights, or shards of FSDP or ZeRO"
        )
    expert_modules(model)  # refuses what has none, such as a dense model
    config: Any = model.config
    meters = Meters(model, config.get_text_config().num_experts_per_tok)
    model.add_module(METERS, meters.train(model.training))


def unmeter(model: nn.Module) -> None:
    """Take the meters out of a model, if it has some."""
    meters = getattr(model, METERS, None)
    if isinstance(meters, Meters):
        meters.remove()
        delattr(model, METERS)


def usage_by_layer(model: nn.Module) -> dict[str, Usage]:
    """Measures of each block's counts since they were last taken, by the block's name.

    Counts are summed over ranks, which call it together.

    Raises:
        ValueError: the model has no meters, or nothing was counted yet.
    """
    counts = {name: total(found.counts) for name, found in counters_by_layer(model).items()}
    return {name: usage(found) for name, found in counts.items()}


def counters_by_layer(model: nn.Module) -> dict[str, UsageCounter]:
    """The counter of each block of a metered model by the block's name, first layer first.

    Raises:
        ValueError: the model has no meters.
    """
    meters = getattr(model, METERS, None)
    if not isinstance(meters, Meters):
        raise ValueError(f"this {type(model).__name__} has no meters: meter(model) adds them")
    found = [one.counter for one in meters if isinstance(one, Meter)]
    return dict(zip(expert_modules(model), found, strict=True))


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """What holds the experts of each block, by the block's name.

    Raises:
        ValueError: there is none.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module) and isinstance(
            getattr(experts, "num_experts", None), int
        ):
            found[name] = experts
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no block with experts that is known: use a "
            "mixture-of-experts model of transformers>=5"
        )
    return found
