"""Shared maps inside models of `transformers`, against the plain models themselves."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Trainer,
    TrainingArguments,
)

from simvq_moe import MoE, usage
from simvq_moe.core.step_state import after_step
from simvq_moe.core.usage import counters, counting
from simvq_moe.engine.world import World
from simvq_moe.integrations.transformers import (
    WEIGHTS,
    AfterStep,
    add_shared_maps,
    fold,
    load_shared_maps,
    moe_blocks,
    usage_by_layer,
)
from simvq_moe.moe.maps import LinearMap
from simvq_moe.moe.routers.topk import TopKOptions
from tests.launching import on_ranks

VOCABULARY, WIDTH, EXPERTS, TOP_K = 40, 16, 8, 2
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": TOP_K,
    "initializer_range": 0.3,  # so that experts matter to the logits
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}
DENSE_LAYER: dict[str, Any] = {"head_dim": 8, "mlp_only_layers": [1]}
CONFIGS: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=EXPERTS),
    "olmoe": OlmoeConfig(**SHAPE, num_experts=EXPERTS),
    "qwen3_moe": Qwen3MoeConfig(
        **SHAPE,
        num_experts=EXPERTS,
        **DENSE_LAYER,
        moe_intermediate_size=8,
        norm_topk_prob=True,
    ),
    "deepseek_v3": DeepseekV3Config(
        **SHAPE,
        **LATENT,
        n_routed_experts=EXPERTS,
        moe_intermediate_size=8,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
    ),
}
SITES = ["expert_out_map", "expert_in_map", "router_map"]
EVERYWHERE: dict[str, Any] = dict.fromkeys(SITES, "linear")
architectures = pytest.mark.parametrize("name", CONFIGS)


def plain(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    # the fused kernel of the default does not take float64
    experts = "eager" if dtype == torch.float64 else "grouped_mm"
    model = AutoModelForCausalLM.from_config(config, experts_implementation=experts).to(dtype)
    for buffer in (b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")):
        buffer += 0.1 * torch.randn_like(buffer)
    return model


def load(directory: Path, **options: Any) -> Any:
    """The model of a directory, and what `transformers` has to say about its keys."""
    return AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)


def tokens(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (3, 20), generator=generator)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for step in range(steps):
        ids = tokens(step)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        after_step(model)


def chosen(name: str, model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Expert ids of every token from the routers' logits, token by token; one tensor a block."""
    with torch.no_grad():
        layers = model(ids, output_router_logits=True).router_logits
    found = []
    for scores, block in zip(layers, moe_blocks(model).values(), strict=True):
        rows = []
        for token in scores.reshape(-1, EXPERTS):
            if name == "deepseek_v3":
                biased = token.sigmoid() + block.get_buffer("gate.e_score_correction_bias")
                groups = biased.view(4, EXPERTS // 4)  # two experts each: all of them count
                for group in groups.sum(-1).argsort()[:2]:
                    groups[group] = -1
                token = groups.view(-1)
            rows.append(token.argsort(descending=True)[:TOP_K])
        found.append(torch.stack(rows))
    return found


def counts_of(choices: list[Tensor]) -> list[Tensor]:
    return [torch.bincount(ids.reshape(-1), minlength=EXPERTS) for ids in choices]


def taken(model: nn.Module) -> list[Tensor]:
    return [counter.take() for counter in counters(model)]


@architectures
@pytest.mark.parametrize("kind", ["linear", "diagonal", "low_rank"])
def test_step_0_is_that_of_the_plain_model_to_the_bit(name: str, kind: str) -> None:
    model = plain(name)
    expected, state = logits(model, tokens()), torch.get_rng_state()
    keys = set(model.state_dict())
    kinds: dict[str, Any] = dict.fromkeys(SITES, kind)
    add_shared_maps(model, **kinds)
    assert torch.equal(logits(model, tokens()), expected)
    assert torch.equal(torch.get_rng_state(), state)
    added = set(model.state_dict()) - keys
    assert keys < set(model.state_dict())
    assert len(added) == 3 * len(moe_blocks(model)) * (2 if kind == "low_rank" else 1)


def test_low_rank_maps_start_apart() -> None:
    model = plain("mixtral")
    add_shared_maps(model, expert_out_map="low_rank", expert_in_map="low_rank")
    starts = {p.detach().numpy().tobytes() for n, p in model.named_parameters() if n[-2:] == ".A"}
    assert len(starts) == 2 * 3


@architectures
@pytest.mark.parametrize("kind", ["linear", "diagonal", "low_rank"])
def test_fold_gives_a_plain_checkpoint_with_the_same_logits(
    name: str, kind: str, tmp_path: Path
) -> None:
    model = plain(name, torch.float64)
    names, printed = list(model.state_dict()), repr(model)
    settings, start = model.config.to_dict(), logits(model, tokens())
    kinds: dict[str, Any] = dict.fromkeys(SITES, kind)
    add_shared_maps(model, **kinds)
    train(model)
    model.eval()
    mapped = logits(model, tokens())
    assert (mapped - start).abs().max() > 0.1
    fold(model)
    folded = logits(model, tokens())
    # DeepSeek-V3 computes the router's logits in float32, whatever the model's dtype
    tolerance = 1e-5 if name == "deepseek_v3" else 1e-9
    assert_close(folded, mapped, rtol=tolerance, atol=tolerance)
    assert list(model.state_dict()) == names
    assert repr(model) == printed
    assert model.config.to_dict() == settings
    assert not counters(model)

    model.save_pretrained(tmp_path)
    loaded, report = load(tmp_path, dtype=torch.float64, experts_implementation="eager")
    assert not any(report.values())
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, tokens()), folded)


@architectures
@pytest.mark.parametrize("kind", ["full", "diagonal", "low_rank"])
def test_a_whitened_router_trains_and_folds_into_its_rows(
    name: str, kind: Any, tmp_path: Path
) -> None:
    model = plain(name, torch.float64)
    names, start = list(model.state_dict()), logits(model, tokens())
    options: dict[str, Any] = {"whiten_router_input": kind, "whitening_rank": 3}
    add_shared_maps(model, router_map="linear", **options)
    assert torch.equal(logits(model, tokens()), start)
    train(model)
    model.eval()
    mapped = logits(model, tokens())
    model.save_pretrained(tmp_path / "mapped")
    loaded, _ = load(tmp_path / "mapped", dtype=torch.float64, experts_implementation="eager")
    load_shared_maps(loaded, tmp_path / "mapped")
    assert torch.equal(logits(loaded, tokens()), mapped)
    fold(model)
    # DeepSeek-V3 computes the router's logits in float32, whatever the model's dtype
    tolerance = 1e-5 if name == "deepseek_v3" else 1e-9
    assert_close(logits(model, tokens()), mapped, rtol=tolerance, atol=tolerance)
    assert list(model.state_dict()) == names
    assert "shared_maps" not in model.config.to_dict()


def test_whitening_makes_what_a_router_sees_uncorrelated() -> None:
    model = plain("mixtral")
    add_shared_maps(model, expert_out_map="none", whiten_router_input="full", whitening_floor=1e-6)
    model(tokens())
    after_step(model)
    seen: list[Tensor] = []
    gate = next(iter(moe_blocks(model).values())).get_submodule("gate")
    gate.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    logits(model, tokens())
    x = seen[0].reshape(-1, WIDTH).double()
    second = x.T @ x / len(x)
    # sums of 60 tokens in float32
    expected = torch.eye(WIDTH).double() * second.diagonal().mean()
    assert_close(second, expected, rtol=0, atol=1e-3 * float(expected.max()))


def test_transformers_trainer_lets_whitening_follow_its_steps(tmp_path: Path) -> None:
    model = plain("mixtral")
    add_shared_maps(model, expert_out_map="none", whiten_router_input="full")
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens()]
    settings = TrainingArguments(
        str(tmp_path), max_steps=3, gradient_accumulation_steps=2, report_to=[], use_cpu=True
    )
    Trainer(model, settings, train_dataset=rows, callbacks=[AfterStep()]).train()  # pyright: ignore[reportArgumentType]
    steps = [
        int(buffer) for name, buffer in model.named_buffers() if name.endswith("whitening.steps")
    ]
    assert steps == [3, 3, 3]


def test_maps_on_deepseek_experts_alone_fold_to_float64_precision() -> None:
    """The router in float32 aside, so that a map on shared experts too would show."""
    model = plain("deepseek_v3", torch.float64)
    add_shared_maps(model, expert_out_map="linear", expert_in_map="linear")
    train(model)
    mapped = logits(model, tokens())
    fold(model)
    assert_close(logits(model, tokens()), mapped, rtol=1e-9, atol=1e-9)


@architectures
def test_gradients_reach_maps_and_what_they_map(name: str) -> None:
    model = plain(name)
    add_shared_maps(model, **EVERYWHERE)
    model(tokens(), labels=tokens()).loss.backward()
    for maps, block in zip(model.shared_maps, moe_blocks(model).values(), strict=True):
        maps_and_weights = [*maps.parameters(), *map(block.get_parameter, WEIGHTS.values())]
        assert len(maps_and_weights) == 6
        for p in maps_and_weights:
            assert p.grad is not None
            assert p.grad.norm() > 0


@pytest.mark.parametrize("site", WEIGHTS)
def test_a_frozen_base_stays_and_learns_again_after_fold(site: str) -> None:
    model = plain("mixtral")
    before = copy.deepcopy(model)
    frozen: dict[str, Any] = {f"train_{site}_base": False}
    add_shared_maps(model, **EVERYWHERE, **frozen)
    train(model, steps=1)
    blocks = zip(moe_blocks(model).values(), moe_blocks(before).values(), strict=True)
    for block, old in blocks:
        for other, name in WEIGHTS.items():
            same = torch.equal(block.get_parameter(name), old.get_parameter(name))
            assert same == (other == site)
    fold(model)
    assert all(p.requires_grad for p in model.parameters())


def test_fold_leaves_frozen_what_came_frozen() -> None:
    model = plain("mixtral").requires_grad_(False)
    add_shared_maps(model, train_expert_out_base=False)
    assert [p.requires_grad for p in model.shared_maps.parameters()] == [True] * 3
    fold(model)
    assert not any(p.requires_grad for p in model.parameters())


@architectures
def test_usage_is_what_the_router_logits_say(name: str) -> None:
    model = plain(name)
    add_shared_maps(model, **EVERYWHERE)
    train(model, steps=2)
    taken(model)
    expected = counts_of(chosen(name, model, tokens()))
    assert_close(taken(model), expected)
    model(tokens())
    measured = usage_by_layer(model)
    assert list(measured) == list(moe_blocks(model))
    assert list(measured.values()) == [usage(counts) for counts in expected]
    assert {(c.kind, c.top_k) for c in counters(model)} == {("experts", TOP_K)}
    assert_close(taken(model), expected)


def test_evaluation_counts_only_inside_counting() -> None:
    model = plain("mixtral").eval()
    add_shared_maps(model, expert_out_map="none")
    logits(model, tokens())
    assert sum(int(counts.sum()) for counts in taken(model)) == 0
    with counting(model):
        expected = counts_of(chosen("mixtral", model, tokens()))
        assert_close(taken(model), expected)


@architectures
def test_generation_counts_every_token_once(name: str) -> None:
    model = plain(name).eval()
    add_shared_maps(model, **EVERYWHERE)
    prompt = tokens()
    with counting(model):
        out = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        counts = taken(model)
    assert out.shape == (3, 25)
    # the last token is never fed back
    assert_close(counts, counts_of(chosen(name, model, out[:, :-1])))


@architectures
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_count_once(name: str, reentrant: bool) -> None:
    model = plain(name)
    add_shared_maps(model, **EVERYWHERE)
    model(tokens(), labels=tokens()).loss.backward()
    once = taken(model)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(tokens(), labels=tokens()).loss.backward()
    assert_close(taken(model), once)
    assert_close({n: p.grad for n, p in model.named_parameters()}, gradients)


def test_a_copy_has_maps_of_its_own() -> None:
    model = plain("mixtral")
    add_shared_maps(model, **EVERYWHERE)
    train(model, steps=1)
    expected = logits(model, tokens())
    twin = copy.deepcopy(model)
    taken(model)
    train(twin, steps=1)
    assert all(not counts.any() for counts in taken(model))
    fold(twin)
    assert torch.equal(logits(model, tokens()), expected)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_a_model_saved_with_maps_comes_back_with_them(name: str, tmp_path: Path) -> None:
    model = plain(name)
    kinds: dict[str, Any] = {"expert_in_map": "diagonal", "router_map": "low_rank", "map_rank": 3}
    add_shared_maps(model, **kinds, train_router_base=False)
    train(model)
    model.eval()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    loaded, report = load(tmp_path)
    assert report["unexpected_keys"] == {n for n in model.state_dict() if "shared_maps" in n}
    with pytest.raises(ValueError, match=r"use load_shared_maps\(model, directory\)"):
        add_shared_maps(loaded)
    load_shared_maps(loaded, tmp_path)
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    assert loaded.config.shared_maps == model.config.shared_maps
    learned = [n for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == learned
    with pytest.raises(ValueError, match="nothing to load for this"):
        load_shared_maps(loaded, tmp_path)


def test_other_models_are_refused_by_name(world: World) -> None:
    del world
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE block that is known: use"):
        add_shared_maps(llama)
    model = plain("mixtral")
    with pytest.raises(ValueError, match="expert_in_map 'separate' is not shared"):
        add_shared_maps(model, expert_in_map="separate")
    with pytest.raises(ValueError, match="has no shared maps: add_shared_maps"):
        fold(model)
    add_shared_maps(model)
    with pytest.raises(ValueError, match=r"with shared maps: fold\(model\) merges them first"):
        add_shared_maps(model)
    experts = moe_blocks(model)["model.layers.0.mlp"].get_submodule("experts")
    down: Any = experts.down_proj
    experts.down_proj = nn.Parameter(down.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp has torch\.float8_e4m3fn weights: load"):
        fold(model)
    experts.down_proj = nn.Parameter(distribute_tensor(down.data, init_device_mesh("cpu", (1,))))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp is split over devices"):
        fold(model)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_bfloat16_weights_with_float32_maps_run_and_train(name: str) -> None:
    model = plain(name, torch.bfloat16)
    add_shared_maps(model, **EVERYWHERE)
    model.shared_maps.float()
    expected = logits(plain(name, torch.bfloat16), tokens())
    assert torch.equal(logits(model, tokens()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.shared_maps.parameters())


def test_a_mixtral_block_with_maps_is_our_layer_with_them() -> None:
    model = plain("mixtral")
    add_shared_maps(model, **EVERYWHERE)
    train(model)
    block, maps = moe_blocks(model)["model.layers.0.mlp"], model.shared_maps[0]
    maps_of_ours: dict[str, Any] = {"expert_out_map": "linear", "expert_in_map": "linear"}
    maps_of_ours["router"] = TopKOptions(map=LinearMap())
    ours = MoE(WIDTH, 24, EXPERTS, TOP_K, expert="swiglu", **maps_of_ours)
    ours.load_state_dict(
        {
            "router.bank.base": block.get_parameter("gate.weight"),
            "router.bank.W": maps.router.W,
            "experts.up.base": block.get_parameter("experts.gate_up_proj"),
            "experts.up.W": maps.expert_in.W,
            "experts.down.base": block.get_parameter("experts.down_proj").mT,
            "experts.down.W": maps.expert_out.W,
        }
    )
    x = torch.randn(2, 7, WIDTH)
    taken(model)
    assert_close(ours(x), block(x))
    assert_close(ours.usage, taken(model)[0])


def train_rank(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=5),
    )
    model = plain("mixtral")
    add_shared_maps(model, **EVERYWHERE)
    parallel: Any = DistributedDataParallel(model)
    for step in range(2):
        ids = tokens(10 * step + rank)
        parallel(ids, labels=ids).loss.backward()
    torch.save(taken(model), f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.distributed
def test_counts_stay_local_under_data_parallelism(tmp_path: Path) -> None:
    on_ranks(train_rank, str(tmp_path))
    model = plain("mixtral")
    for rank in range(2):
        choices = [counts_of(chosen("mixtral", model, tokens(10 * s + rank))) for s in range(2)]
        expected = [a + b for a, b in zip(*choices, strict=True)]
        assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)
