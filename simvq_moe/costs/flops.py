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
from simvq_moe.core.bank import Bank
from simvq_moe.core.whitening import FullWhitening, LowRankWhitening, Whitening
from simvq_moe.costs.activations import sample_cost
from simvq_moe.models.attention import Attention
from simvq_moe.models.blocks import MoEBlock
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.moe import MoE
from simvq_moe.moe.routers.base import NoisyTopKRouter, Router, TopKRouter
from simvq_moe.moe.routers.distance import CosineRouter, DistanceRouter
from simvq_moe.moe.routers.hyper import HyperRouter


class Parts(NamedTuple):
    """Of a tensor with a part for each expert that this rank holds, as shares of its size."""

    everywhere: Fraction
    """The parts of all experts, on whatever ranks."""
    met: Fraction
    """The parts that a token meets: those of top_k experts."""


class Product(NamedTuple):
    """A matrix product, for one token."""

    multiply_adds: float
    learned: bool = True
    """Whether both factors have a gradient."""
    backward: bool = True
    """Whether one has."""

    @property
    def flops(self) -> float:
        """Forward and backward, a multiply-add as two."""
        return 2.0 * self.multiply_adds * (1 + self.backward + (self.backward and self.learned))


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
    parts, whole = _of_experts(model), Parts(Fraction(1), Fraction(1))
    of = [(p.numel(), parts.get(id(p), whole)) for p in model.parameters()]
    return {
        "total": int(sum(size * part.everywhere for size, part in of)),
        "active": int(sum(size * part.met for size, part in of)),
    }


def expert_parameters(model: nn.Module) -> int:
    """Learned parameters that belong to one expert each, of all experts on whatever ranks."""
    parts = _of_experts(model)
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
    parts = _of_experts(model)
    products = [] if model.head is not None else [Product(model.embedding.weight.numel())]
    for layer in model.modules():
        products += _of_layer(layer, model.context, parts, batch_tokens)
    return round(sum(product.flops for product in products))


def _of_experts(model: nn.Module) -> dict[int, Parts]:
    """By id, the tensors of which each expert has its own part, or which belong to one."""
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
        yield met(layer.weight, _is_learned(layer.weight))
    elif isinstance(layer, MoE):
        for bank in layer.experts.banks:
            learned = _is_learned(bank.base)
            if bank.shared:
                yield met(bank.base, learned)
                yield from _map(bank, 1.0)
            else:
                yield met(bank.base, learned=True)
                yield from _map(bank, _rows(bank) / batch_tokens, learned)
        if layer.router.keys is not None:  # once more than in the router, for the chosen experts
            keys = layer.router.keys.base
            yield Product(keys.numel() * layer.top_k / len(keys), _is_learned(keys))
    elif isinstance(layer, Router):
        yield from _of_router(layer, batch_tokens)


def _of_whitening(whitening: Whitening, batch_tokens: int) -> Iterator[Product]:
    """The moments of the steps that count."""
    vectors = (1 + 1 / batch_tokens) / whitening.every
    if isinstance(whitening, FullWhitening):
        yield Product(whitening.width**2 * vectors, backward=False)
    if isinstance(whitening, LowRankWhitening):
        yield Product(2 * whitening.axes.numel() * vectors, backward=False)


def _turned(router: Router, batch_tokens: int, *, learned: bool = True) -> Iterator[Product]:
    """Rows under the whitening, once a forward pass."""
    rows = router.num_experts / batch_tokens
    if isinstance(router.centre, FullWhitening):
        yield Product(rows * router.centre.width**2, learned=False, backward=learned)
    if isinstance(router.centre, LowRankWhitening):
        yield Product(rows * 2 * router.centre.axes.numel(), learned=False, backward=learned)


def _of_router(router: Router, batch_tokens: int) -> Iterator[Product]:
    if isinstance(router.centre, Whitening):
        yield from _of_whitening(router.centre, batch_tokens)
    if isinstance(router, HyperRouter):
        yield Product(router.num_experts * len(router.embedding))
        yield Product((router.A.numel() + router.B.numel()) / batch_tokens, learned=False)
        yield from _turned(router, batch_tokens)
    if isinstance(router, CosineRouter):
        yield Product(router.projection.numel())
    if isinstance(router, NoisyTopKRouter):
        yield Product(router.noise.numel())
        yield from _turned(router, batch_tokens)
    bank = router.bank if isinstance(router, TopKRouter) else router.keys
    if bank is None:
        return
    learned = _is_learned(bank.base)
    if isinstance(router, CosineRouter):
        yield Product(_rows(bank) * bank.width, learned or bool(bank.maps))
        yield from _map(bank, _rows(bank) / batch_tokens, learned)
        return
    if isinstance(router.centre, Whitening):
        moves = learned or bool(bank.maps)
        yield Product(_rows(bank) * bank.width, moves)
        yield from _map(bank, _rows(bank) / batch_tokens, learned)
        yield from _turned(router, batch_tokens, learned=moves)
        return
    yield Product(bank.base.numel(), learned)
    yield from _map(bank, 1.0)
    if isinstance(router, DistanceRouter):  # the lengths of all rows, and the chosen ones
        yield Product(bank.width, learned=False)  # with the place from which they are measured
        yield from _map(bank, _rows(bank) / batch_tokens + router.top_k, learned)


def _map(bank: Bank, rows: float, learned: bool = True) -> Iterator[Product]:
    """The map of a bank on so many rows a token; a diagonal one is no matrix product."""
    if bank.transform != "diagonal":
        separate = 1 if bank.shared else len(bank.base)
        yield from (Product(rows * p.numel() / separate, learned) for p in bank.maps)


def _rows(bank: Bank) -> int:
    return bank.base.numel() // bank.base.shape[-1]


def _is_learned(weights: Tensor) -> bool:
    return isinstance(weights, nn.Parameter)
