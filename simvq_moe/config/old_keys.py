"""Keys of a config that have another name now, so that an old file or flag is told the new one."""

from __future__ import annotations

OLD_KEYS: dict[str, str] = {
    "moe.expert": "moe.expert.kind",
    "moe.router": "moe.router.kind",
    "moe.router_map": "moe.router.map.kind",
    "moe.router_base_width": "moe.router.map.base_width",
    "moe.router_projection": "moe.router.projection",
    "moe.router_codebook_weight": "moe.router.codebook_weight",
    "moe.router_commitment_weight": "moe.router.commitment_weight",
    "moe.router_init": "moe.router.init",
    "moe.self_selecting_rank": "moe.router.rank",
    "moe.router_bias": "moe.router.bias",
    "moe.centre_router_input": "moe.router.centre",
    "moe.whiten_router_input": "moe.router.whiten.kind",
    "moe.whitening_exponent": "moe.router.whiten.exponent",
    "moe.whitening_decay": "moe.router.whiten.decay",
    "moe.whitening_floor": "moe.router.whiten.floor",
    "moe.whitening_every": "moe.router.whiten.every",
    "moe.whitening_rank": "moe.router.whiten.rank",
    "moe.expert_out_map": "moe.expert_out_map.kind",
    "moe.train_expert_out_base": "moe.expert_out_map.train_base",
    "moe.expert_in_map": "moe.expert_in_map.kind",
    "moe.train_expert_in_base": "moe.expert_in_map.train_base",
    "moe.balance": "moe.balance.kind",
    "moe.balance_weight": "moe.balance.weight",
    "moe.bias_update_rate": "moe.balance.rate",
    "moe.map_rank": "moe.router.map.rank, moe.expert_in_map.rank or moe.expert_out_map.rank",
    "moe.train_router_base": "moe.router.map.train_base (self_selecting: moe.router.train_base)",
}
"""The new key of an old one, such as "moe.router_map": "moe.router.map.kind"."""


def new_key(key: str) -> str | None:
    """What a key is called now; None: it is no old key."""
    return OLD_KEYS.get(key)
