"""What of mixture layers can't run in a run; what can't run in a layer says `MoEConfig.misfits`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from simvq_moe.config.loading import flatten
from simvq_moe.config.moe import MoEConfig
from simvq_moe.config.schema import Config

OF_DEEPSPEED = ("experts", "top_k", "hidden", "gates", "dispatch", "capacity_factor", "z_loss")
"""Beginnings of the keys of options that DeepSpeed's own layer has as well."""
OF_MIXTURES = ("router", "balance", "expert_in_map", "expert_out_map")
"""Parts that mean nothing where no block has a mixture."""


def with_gates(config: Config) -> Config:
    """The config with the convention of its gates spelled out."""
    return replace(config, moe=replace(config.moe, gates=config.moe.convention))


def with_default_gates(config: Config) -> Config:
    """The config without the convention of its gates where it is the one that is taken unasked."""
    unasked = replace(config.moe, gates=MoEConfig().gates)
    return replace(config, moe=unasked) if unasked.convention == config.moe.gates else config


def moe_problems(config: Config) -> Iterator[str]:
    """What of the config's mixtures can't run, key, value and way out.

    Args:
        config: one whose gates are spelled out.
    """
    moe = config.moe
    yield from moe.misfits(config.language_model.width, "moe.")
    if moe.dispatch == "deepspeed_capacity":
        yield from _baseline_problems(moe)
    elif moe.gate_teaches_nothing:
        yield (
            f"moe.gates {moe.gates!r} with moe.top_k 1: the one gate is the constant 1, so the "
            "router gets no gradient: use 'softmax_topk' or 'default', or raise moe.top_k"
        )
    if moe.experts % moe.expert_parallel:
        yield (
            f"moe.experts {moe.experts} does not divide by moe.expert_parallel "
            f"{moe.expert_parallel}: change one of them"
        )
    if config.language_model.moe_every == 0:
        for key, value in flatten(moe).items():
            if key.startswith(OF_MIXTURES) and value != flatten(MoEConfig()).get(key):
                yield (
                    f"moe.{key} {value!r} with language_model.moe_every 0, which leaves no "
                    "mixture: drop it, or use 1"
                )


def _baseline_problems(moe: MoEConfig) -> Iterator[str]:
    """What DeepSpeed's own layer has no option for."""
    other = "with moe.dispatch 'deepspeed_capacity'"
    for key, value in flatten(moe).items():
        known = key.startswith(("expert.", "balance.", *OF_DEEPSPEED))
        if not known and value != flatten(MoEConfig()).get(key):
            yield (
                f"moe.{key} {value} {other}: DeepSpeed's layer has no such option: drop it, or use "
                "moe.dispatch 'sorted'"
            )
    if moe.balance.has_biases:
        yield (
            f"moe.balance.kind {moe.balance.kind!r} {other}: use a kind without biases, or "
            "moe.dispatch 'sorted'"
        )
    convention = "topk_softmax" if moe.top_k > 1 else "softmax_topk"
    if moe.gates != convention:
        yield (
            f"moe.gates {moe.gates!r} {other} and moe.top_k {moe.top_k}: DeepSpeed's gates are "
            f"{convention!r}: set that"
        )
