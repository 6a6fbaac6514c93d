"""Options of mixture layers that can't run, or not together; see `config_checks`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

from simvq_moe.config.schema import Config, MoEConfig
from simvq_moe.moe.routers.base import default_gates
from simvq_moe.moe.routers.build import LEARN_BY_GATES, OF_PRODUCTS

OF_DEEPSPEED = {
    *("experts", "top_k", "hidden", "expert", "capacity_factor", "gates", "dispatch", "balance"),
    *("balance_weight", "z_loss_weight"),
}
"""Options that DeepSpeed's own layer has as well."""


def with_gates(config: Config) -> Config:
    """The config with the convention of its gates spelled out."""
    moe = config.moe
    if moe.gates != "default":
        return config
    return replace(
        config, moe=replace(moe, gates=default_gates(moe.router, moe.experts, moe.top_k))
    )


def baseline_problems(moe: MoEConfig) -> Iterator[str]:
    """What DeepSpeed's own layer has no option for."""
    for name, default in asdict(MoEConfig()).items():
        value = getattr(moe, name)
        if name not in OF_DEEPSPEED and value != default:
            yield (
                f"moe.{name} {value} with moe.dispatch 'deepspeed_capacity': DeepSpeed's layer has "
                "no such option: drop it, or use moe.dispatch 'sorted'"
            )
    if moe.balance not in ("none", "aux"):
        yield (
            f"moe.balance {moe.balance!r} with moe.dispatch 'deepspeed_capacity': use 'none' or "
            "'aux', or moe.dispatch 'sorted'"
        )
    convention = "topk_softmax" if moe.top_k > 1 else "softmax_topk"
    if moe.gates != convention:
        yield (
            f"moe.gates {moe.gates!r} with moe.dispatch 'deepspeed_capacity' and moe.top_k "
            f"{moe.top_k}: DeepSpeed's gates are {convention!r}: set that"
        )


OF_ROWS = ("topk", "noisy_topk", "cosine", "distance", "expert_choice")
SCORING = (*OF_ROWS, "hyper", "self_selecting")
OF_ROUTERS = {
    "router_map": OF_ROWS,
    "router_base_width": OF_ROWS,
    "train_router_base": (*OF_ROWS, "self_selecting"),
    "router_projection": ("cosine",),
    "router_codebook_weight": ("distance",),
    "router_commitment_weight": ("distance",),
    "router_init": ("distance", "self_selecting"),
    "self_selecting_rank": ("self_selecting",),
    "router_bias": OF_PRODUCTS,
    "centre_router_input": SCORING,
    "whiten_router_input": OF_PRODUCTS,
    "z_loss_weight": SCORING,
    "balance": tuple(kind for kind in SCORING if kind != "expert_choice"),
    "capacity_factor": (*(kind for kind in SCORING if kind != "expert_choice"), "hash"),
}
"""Routers that have the option; for others only its default is accepted."""


def whitening_problems(moe: MoEConfig, width: int) -> Iterator[str]:
    """Options of the whitening that mean nothing without it, or are out of their range."""
    kind = moe.whiten_router_input
    for name in ("exponent", "decay", "floor", "every", "rank"):
        option = f"whitening_{name}"
        value, default = getattr(moe, option), getattr(MoEConfig(), option)
        if value != default and (kind == "none" or (name == "rank" and kind != "low_rank")):
            kinds = "'low_rank'" if name == "rank" else "'full', 'diagonal' or 'low_rank'"
            yield (
                f"moe.{option} {value} with moe.whiten_router_input {kind!r}: drop it, or use "
                f"{kinds}"
            )
    if kind != "none" and moe.centre_router_input:
        yield (
            f"moe.centre_router_input with moe.whiten_router_input {kind!r}, which centres as "
            "well: drop it"
        )
    if kind == "low_rank" and not moe.whitening_rank < width:
        yield (
            f"moe.whitening_rank {moe.whitening_rank} >= language_model.width {width}: lower it, "
            "or use moe.whiten_router_input 'full'"
        )


def router_problems(moe: MoEConfig) -> Iterator[str]:
    """Options that mean nothing to the router, or do not go together."""
    for name, kinds in OF_ROUTERS.items():
        value = getattr(moe, name)
        if moe.router not in kinds and value != getattr(MoEConfig(), name):
            yield (
                f"moe.{name} {value} means nothing to moe.router {moe.router!r}: drop it, or use "
                f"router {' or '.join(kinds)}"
            )
    if moe.router == "expert_choice" and moe.gates != "softmax_topk":
        yield (
            f"moe.gates {moe.gates!r} with moe.router 'expert_choice': its gates are the softmax "
            "over all experts: set 'softmax_topk'"
        )
    frozen = not moe.train_router_base and moe.router_map == "none"
    learns = moe.router in LEARN_BY_GATES and not frozen
    if learns and moe.experts > moe.top_k == 1 and moe.gates in ("topk_softmax", "sigmoid"):
        yield (
            f"moe.gates {moe.gates!r} with moe.top_k 1: the one gate is the constant 1, so the "
            "router gets no gradient: use 'softmax_topk' or 'default', or raise moe.top_k"
        )
    if moe.router == "hash" and moe.gates == "softmax_topk":
        yield (
            "moe.gates 'softmax_topk' with moe.router 'hash': its gates are equal and sum to 1: "
            "set 'topk_softmax'"
        )
    if moe.router == "self_selecting" and moe.expert_in_map == "separate":
        yield (
            "moe.expert_in_map 'separate' with moe.router 'self_selecting': its keys are separate "
            "already: use a shared map or 'none'"
        )
    started = "expert_in_map" if moe.router == "self_selecting" else "router_map"
    if moe.router_init == "data" and getattr(moe, started) not in ("linear", "diagonal"):
        yield (
            f"moe.router_init 'data' sets moe.{started}, which is {getattr(moe, started)!r}: use "
            "'linear' or 'diagonal'"
        )
    if moe.balance == "quantile" and moe.top_k == moe.experts:
        yield (
            f"moe.balance 'quantile' with moe.top_k {moe.top_k} of moe.experts {moe.experts}: "
            "every expert is chosen: lower moe.top_k, or use moe.balance 'none'"
        )
    if moe.balance != "loss_free" and moe.bias_update_rate != MoEConfig().bias_update_rate:
        yield (
            f"moe.bias_update_rate {moe.bias_update_rate} with moe.balance {moe.balance!r}: drop "
            "it, or use moe.balance 'loss_free'"
        )
