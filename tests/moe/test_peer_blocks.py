"""The same outputs and gradients as blocks of `transformers` with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, PreTrainedConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from simvq_moe import MoE

WIDTH, HIDDEN, EXPERTS, TOP_K = 16, 24, 8, 2
PEERS: dict[str, tuple[type[nn.Module], PreTrainedConfig, dict[str, Any]]] = {
    "mixtral": (
        MixtralSparseMoeBlock,
        MixtralConfig(
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_local_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
        ),
        {"gates": "topk_softmax"},
    ),
    "olmoe": (
        OlmoeSparseMoeBlock,
        OlmoeConfig(
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
        ),
        {"gates": "softmax_topk"},
    ),
    "deepseek_v3": (
        DeepseekV3MoE,
        DeepseekV3Config(
            hidden_size=WIDTH,
            moe_intermediate_size=HIDDEN,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            n_shared_experts=2,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
        ),
        {"gates": "sigmoid", "shared_experts": 2},
    ),
}


def by_their_names(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our layer's parameters or gradients, in the block's shapes."""
    named = {
        "gate.weight": ours["router.bank.base"],
        "experts.gate_up_proj": ours["experts.up.base"],
        "experts.down_proj": ours["experts.down.base"].mT,
    }
    if "shared_experts.up.weight" in ours:
        gate, up = ours["shared_experts.up.weight"].chunk(2)
        named["shared_experts.gate_proj.weight"] = gate
        named["shared_experts.up_proj.weight"] = up
        named["shared_experts.down_proj.weight"] = ours["shared_experts.down.weight"]
    return named


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", PEERS)
def test_a_block_with_the_same_weights(name: str) -> None:
    block_class, config, options = PEERS[name]
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    block = block_class(config)
    ours = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K, expert="swiglu", **options)
    with torch.no_grad():
        mine = by_their_names(dict(ours.named_parameters()))
        for key, p in block.named_parameters():
            mine[key].copy_(p.normal_(std=0.3))
    x, weights = torch.randn(2, 3, 50, WIDTH)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(a), block(b)
    assert_close(y, expected)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(a.grad, b.grad)
    assert_close(by_their_names(gradients(ours)), gradients(block))
