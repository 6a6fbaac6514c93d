"""Meters in models of `transformers`, against counts of what their routers say."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Glm4MoeConfig, GptOssConfig, PreTrainedConfig

from simvq_moe import counting, meter, usage, usage_by_layer
from simvq_moe.core.usage import counters
from simvq_moe.integrations.meters import counters_by_layer, unmeter
from simvq_moe.integrations.transformers import add_shared_maps
from tests.integrations.test_transformers import CONFIGS, EXPERTS, SHAPE, TOP_K, tokens
from tests.launching import on_ranks

EVERY: dict[str, PreTrainedConfig] = CONFIGS | {
    "glm4_moe": Glm4MoeConfig(
        **SHAPE,
        n_routed_experts=EXPERTS,
        moe_intermediate_size=8,
        first_k_dense_replace=1,
    ),
    "gpt_oss": GptOssConfig(**SHAPE, head_dim=8, num_local_experts=EXPERTS),
}
WITH_LOGITS = ("mixtral", "olmoe", "qwen3_moe", "gpt_oss")
"""Architectures that return the logits of their routers."""


def plain(name: str) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(EVERY[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def said_by_routers(model: nn.Module) -> list[Tensor]:
    """Gets the ids of every router at each forward pass."""
    found: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith((".gate", ".router")) and hasattr(module, "top_k"):
            module.register_forward_hook(lambda _, __, output: found.append(output[2]))
    return found


def counted(ids: Tensor, mask: Tensor) -> Tensor:
    real = ids.view(*mask.shape, -1)[mask.bool()]
    return torch.bincount(real.flatten(), minlength=EXPERTS)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", EVERY)
def test_counts_are_the_choices_of_tokens_that_are_none_of_padding(name: str, side: str) -> None:
    model, ids = plain(name), tokens()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    said = said_by_routers(model)
    meter(model)
    meter(model)  # has them already
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    mask[2, :1] = 0
    mask = mask if side == "left" else mask.flip(1)
    options = {"output_router_logits": True} if name in WITH_LOGITS else {}
    found = model.train()(ids, attention_mask=mask, **options)
    expected = [counted(one, mask) for one in said]
    if name in WITH_LOGITS:
        by_logits = [logits.topk(TOP_K).indices for logits in found.router_logits]
        assert_close([counted(one, mask) for one in by_logits], expected)
    layers = counters_by_layer(model)
    assert_close([counter.counts for counter in layers.values()], expected)
    assert sum(map(int, expected[0])) == TOP_K * int(mask.sum())
    assert usage_by_layer(model) == {
        name: usage(counts) for name, counts in zip(layers, expected, strict=True)
    }
    model.eval()(ids)
    assert_close([counter.take() for counter in layers.values()], expected)
    # without a mask all tokens are real
    model.train()(ids)
    assert {int(counter.counts.sum()) for counter in layers.values()} == {TOP_K * ids.numel()}
    assert_close(model.state_dict(), before)
    unmeter(model)
    assert not counters(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_generation_with_a_cache_counts_each_token_once() -> None:
    model, ids = plain("mixtral").eval(), tokens()[:, :6]
    meter(model)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with counting(model) as found:
        model.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None
        )
        # what is drawn last is not read
        assert {int(counter.counts.sum()) for counter in found} == {TOP_K * (16 + 3 * len(ids))}


def test_what_checkpointing_runs_again_is_counted_once() -> None:
    model, ids = plain("olmoe").train(), tokens()
    meter(model)
    model.activation_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    assert {int(counter.counts.sum()) for counter in counters(model)} == {TOP_K * ids.numel()}


def test_maps_come_with_meters() -> None:
    model, ids = plain("mixtral").train(), tokens()
    add_shared_maps(model)
    model(ids)
    assert len(usage_by_layer(model)) == SHAPE["num_hidden_layers"]


def test_a_model_without_experts_or_meters_is_refused_in_a_line() -> None:
    from transformers import LlamaConfig

    shape = {key: value for key, value in SHAPE.items() if key != "num_experts_per_tok"}
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**shape))
    with pytest.raises(ValueError, match="has no block with experts that is known"):
        meter(llama)
    with pytest.raises(ValueError, match="Linear has no block with experts that is known"):
        meter(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has no meters: meter\\(model\\) adds them"):
        usage_by_layer(plain("mixtral"))
    model = plain("mixtral").eval()
    meter(model)
    with counting(model):
        model(tokens())
        assert usage_by_layer(model)
    with pytest.raises(ValueError, match="and read its counts before that ends"):
        usage_by_layer(model)


def _on_a_rank(rank: int, folder: str) -> None:
    rendezvous, limit = f"file://{folder}/store", timedelta(seconds=120)
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=2, timeout=limit)
    model = plain("mixtral").train()
    meter(model)
    model(tokens(rank))
    torch.save(usage_by_layer(model), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_counts_are_summed_over_ranks(tmp_path: Path) -> None:
    on_ranks(_on_a_rank, str(tmp_path))
    alone = plain("mixtral").train()
    meter(alone)
    for rank in range(2):
        alone(tokens(rank))
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=False) == usage_by_layer(alone)
