"""What a model costs: its parameters, and the floating-point operations of a token."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from simvq_moe.config.schema import Config
from simvq_moe.costs.activations import sample_cost
from simvq_moe.models.attention import Attention
from simvq_moe.models.blocks import MoEBlock
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.moe import MoE
from simvq_moe.moe.products import Product, is_learned, number_of_rows, products_of_map
from simvq_moe.moe.routers.base import Router


class Parts(NamedTuple):
    """Shares of a tensor's size, which has a part for each expert that this rank holds."""

    everywhere: Fraction
    """The parts of all experts, on whatever ranks."""
    met: Fraction
    """The parts that a token meets: those of top_k experts."""


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process had: on its accelerator, or else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cost_of(
    model: nn.Module, config: Config, world_size: int, *, run_samples: bool = False
) -> dict[str, Any]:
    """`parameter_counts`, and `flops_per_token` in a run on so many ranks.

    Args:
        run_samples: count the operations of a tokenizer as well, for which it runs, some seconds.
    """
    cost: dict[str, Any] = {"parameters": parameter_counts(model)}
    samples = config.train.batch_size // (world_size * config.train.accumulation)
    if isinstance(model, LanguageModel):
        cost["flops_per_token"] = flops_per_token(model, samples * config.data.context)
    elif run_samples:
        cost["flops_per_token"] = sample_cost(model, config).flops_per_token(samples)
    return cost


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """All learned parameters, on whatever ranks, and those that a token meets."""
    parts, whole = of_experts(model), Parts(Fraction(1), Fraction(1))
    sizes = [(p.numel(), parts.get(id(p), whole)) for p in model.parameters()]
    return {
        "total": int(sum(size * part.everywhere for size, part in sizes)),
        "active": int(sum(size * part.met for size, part in sizes)),
    }


def expert_parameters(model: nn.Module) -> int:
    """Learned parameters that belong to one expert each, of all experts on whatever ranks."""
    parts = of_experts(model)
    learned = (p for p in model.parameters() if p.requires_grad and id(p) in parts)
    return int(sum(p.numel() * parts[id(p)].everywhere for p in learned))


def flops_per_token(model: LanguageModel, batch_tokens: int) -> int:
    """Floating-point operations of forward and backward for a token, in a full context.

    The model's matrix products (PaLM, arXiv:2204.02311, appendix B), a multiply-add as two: each
    once forward and twice backward, or once if one factor is frozen; attention as if it were not
    causal; top_k of the experts, also under a capacity. Neither elementwise work, sums by gates nor
    what activation checkpointing repeats.

    Args:
        batch_tokens: tokens of one forward pass on a rank: they share what is computed once in it,
            such as rows under separate maps.
    """
    parts = of_experts(model)
    products = [] if model.head is not None else [Product(model.embedding.weight.numel())]
    for layer in model.modules():
        products += _of_layer(layer, model.context, parts, batch_tokens)
    return round(sum(product.flops for product in products))


def of_experts(model: nn.Module) -> dict[int, Parts]:
    """Tensors of which each expert has its own part, or which belong to one, by their ids."""
    parts: dict[int, Parts] = {}
    for module in model.modules():
        if isinstance(module, MoE):
            banks = module.experts.banks
            tensors = [bank.base for bank in banks]
            tensors += [W for bank in banks if not bank.shared for W in bank.maps]
            tensors += [] if module.experts.bias is None else [module.experts.bias]
            numbers = (module.num_experts, module.top_k)
            for tensor in tensors:
                parts[id(tensor)] = Parts(*(Fraction(n, len(tensor)) for n in numbers))
        elif isinstance(module, MoEBlock) and not isinstance(module.moe, MoE):
            met = Fraction(module.moe.top_k, module.moe.num_experts)
            experts = module.moe.inner.deepspeed_moe.experts.parameters()
            parts |= {id(p): Parts(Fraction(1), met) for p in experts}
    return parts


def _of_layer(
    layer: nn.Module, context: int, parts: Mapping[int, Parts], batch_tokens: int
) -> Iterator[Product]:
    """Products with a layer's own weights, or with those of banks that it owns."""

    def met(weights: Tensor, learned: bool) -> Product:
        share = parts[id(weights)].met if id(weights) in parts else 1
        return Product(float(weights.numel() * share), learned)

    if isinstance(layer, Attention):
        yield Product(2 * context * layer.out.in_features)  # scores, and the sum that they weigh
    elif isinstance(layer, nn.Linear):
        yield met(layer.weight, is_learned(layer.weight))
    elif isinstance(layer, MoE):
        for bank in layer.experts.banks:
            learned = is_learned(bank.base)
            if bank.shared:
                yield met(bank.base, learned)
                yield from products_of_map(bank, 1.0)
            else:
                yield met(bank.base, learned=True)
                yield from products_of_map(bank, number_of_rows(bank) / batch_tokens, learned)
        if layer.router.keys is not None:  # once more than in the router, for the chosen experts
            keys = layer.router.keys.base
            yield Product(keys.numel() * layer.top_k / len(keys), is_learned(keys))
    elif isinstance(layer, Router):
        yield from layer.products(batch_tokens)
