"""Every kind of router, built from the options of a layer, and started from data if asked to."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simvq_moe.core.bank import Transform
from simvq_moe.core.choices import check_choice
from simvq_moe.core.whitening import WhiteningKind, build_whitening
from simvq_moe.moe.routers.base import Gates, NoisyTopKRouter, Router, TopKRouter
from simvq_moe.moe.routers.distance import CosineRouter, DistanceRouter
from simvq_moe.moe.routers.expert_choice import ExpertChoiceRouter, HashRouter
from simvq_moe.moe.routers.hyper import HyperRouter
from simvq_moe.moe.routers.self_selecting import SelfSelectingRouter
from simvq_moe.moe.running_mean import RunningMean
from simvq_moe.moe.selection_bias import LossFreeBias, QuantileBias

RouterKind = Literal[
    "topk",
    "noisy_topk",
    "cosine",
    "hyper",
    "distance",
    "self_selecting",
    "expert_choice",
    "hash",
]
RouterInit = Literal["default", "data"]
Balance = Literal["none", "aux", "loss_free", "quantile"]

OF_ROWS: dict[RouterKind, type[TopKRouter]] = {
    "topk": TopKRouter,
    "noisy_topk": NoisyTopKRouter,
    "cosine": CosineRouter,
    "distance": DistanceRouter,
    "expert_choice": ExpertChoiceRouter,
}
"""Kinds that compare tokens with one row of a bank for each expert."""
OF_PRODUCTS: tuple[RouterKind, ...] = ("topk", "noisy_topk", "hyper", "expert_choice")
"""Kinds whose logits are products of tokens and rows, and may have a bias: what whitening maps."""

LEARN_BY_GATES = ("topk", "noisy_topk", "cosine", "hyper")
"""Kinds that are learned through the gates alone: distances have losses of their own, experts
compute with the keys that select them, and a table is not learned."""


@torch.no_grad()
def start_from_data(model: nn.Module, batch: Tensor) -> None:
    """Call `start` of every router with what it sees of a batch; all ranks call it together.

    One forward pass in evaluation, in which a layer has started when the next one sees its output.

    Args:
        model: `model(batch)` runs every layer.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    was_training = model.training
    for router in routers:
        router.starting = True
    model.eval()(batch)
    for router in routers:
        router.starting = False
    model.train(was_training)


def build_router(
    kind: RouterKind,
    width: int,
    experts: int,
    top_k: int,
    *,
    gates: Gates = "topk_softmax",
    router_map: Transform = "none",
    router_base_width: int | None = None,
    train_router_base: bool = True,
    expert_in_map: Transform = "none",
    map_rank: int = 8,
    router_projection: int | None = None,
    router_init: RouterInit = "default",
    self_selecting_rank: int = 8,
    vocabulary: int | None = None,
    router_bias: bool = False,
    centre_router_input: bool = False,
    whiten_router_input: Literal["none"] | WhiteningKind = "none",
    whitening_exponent: float = 1.0,
    whitening_decay: float = 0.99,
    whitening_floor: float = 0.01,
    whitening_every: int = 10,
    whitening_rank: int = 32,
    balance: Balance = "none",
    bias_update_rate: float = 0.001,
) -> Router:
    """The router of a layer; options are those of `MoE`, and of other kinds are not looked at.

    Raises:
        ValueError: an option is no choice, or a kind knows no balance by biases, no input to be
            centred, or no products of the input with rows to be whitened.
    """
    for name, value, choices in (
        ("router", kind, RouterKind),
        ("gates", gates, Gates),
        ("router_map", router_map, Transform),
        ("expert_in_map", expert_in_map, Transform),
        ("router_init", router_init, RouterInit),
        ("balance", balance, Balance),
    ):
        check_choice(name, value, choices)
    router: Router
    of_products = kind in OF_PRODUCTS
    if not of_products and (router_bias or whiten_router_input != "none"):
        option = "router_bias" if router_bias else f"whiten_router_input {whiten_router_input!r}"
        raise ValueError(
            f"{option} with router {kind!r}, whose logits are no products with rows: drop it, or "
            f"use router {' or '.join(OF_PRODUCTS)}"
        )
    if centre_router_input and whiten_router_input != "none":
        raise ValueError(
            f"centre_router_input with whiten_router_input {whiten_router_input!r}, which centres "
            "as well: drop centre_router_input"
        )
    if kind == "self_selecting":
        keys: dict[str, Any] = {"transform": expert_in_map, "map_rank": map_rank}
        keys |= {"rank": self_selecting_rank, "train_base": train_router_base}
        router = SelfSelectingRouter(width, experts, top_k, gates=gates, **keys)
    elif kind == "hyper":
        router = HyperRouter(width, experts, top_k, gates=gates, expert_bias=router_bias)
    elif kind == "hash":
        router = HashRouter(vocabulary, experts, top_k, gates=gates)
    else:
        rows: dict[str, Any] = {"transform": router_map, "base_width": router_base_width}
        rows |= {"train_base": train_router_base, "rank": map_rank}
        if kind == "cosine":
            rows["projection"] = router_projection
        if kind == "distance":
            rows["bias"] = router_init == "data"
        if of_products:
            rows["expert_bias"] = router_bias
        router = OF_ROWS[kind](width, experts, top_k, gates=gates, **rows)
    if centre_router_input:
        if kind == "hash":
            raise ValueError("router 'hash' sees no input: drop centre_router_input")
        router.centre = RunningMean(width)
    if whiten_router_input != "none":
        router.centre = build_whitening(
            whiten_router_input,
            width,
            exponent=whitening_exponent,
            decay=whitening_decay,
            floor=whitening_floor,
            every=whitening_every,
            rank=whitening_rank,
        )
    if balance in ("loss_free", "quantile"):
        if kind in ("expert_choice", "hash"):
            raise ValueError(
                f"balance {balance!r} with router {kind!r}, whose choice knows no bias: use 'none'"
            )
        free = balance == "loss_free"
        router.selection = (
            LossFreeBias(experts, bias_update_rate) if free else QuantileBias(experts, top_k)
        )
    if top_k == 1 and experts > 1 and router.gates_sum_to_one and kind in LEARN_BY_GATES:
        warnings.warn(
            f"top_k 1 with gates {gates!r}: the one gate is always 1, so that router {kind!r} "
            "learns nothing from the layer's output: use gates 'softmax_topk'",
            stacklevel=3,
        )
    return router
