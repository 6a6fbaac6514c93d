"""Which architecture of `transformers` computes what a language model of ours computes, and how it
calls the weights.

Maps must be folded first. Nothing is approximated: what no architecture holds is refused, with the
option under which a run could be exported. All of them have our attention (rotary positions in
halves, no biases) and our norms; what tells them apart is the mixture, and whether queries and keys
are normalized (language_model.qk_norm):

    llama           no mixture
    mixtral         softmax over the chosen
    ernie4_5_moe    the same, also with biases of the choice, shared experts and dense blocks
    qwen2_moe       softmax over all experts, also with shared experts and dense blocks
    glm4_moe        normalized sigmoids, also with biases, shared experts and first blocks dense,
                    and normalized queries and keys
    qwen3           normalized queries and keys, no mixture
    qwen3_moe       the same, softmax over the chosen or over all experts, also with dense blocks

OLMoE normalizes queries over all heads at once and DeepSeek-V3 compresses them: ours does neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simvq_moe.config.moe import MoEConfig
from simvq_moe.config.schema import Config, LanguageModelConfig
from simvq_moe.models.attention import ROTARY_BASE

EPSILON = torch.finfo(torch.float32).eps
"""Under the root of our norms, in float32."""


@dataclass(frozen=True)
class Architecture:
    """One of `transformers`, and what it calls the parts of a block.

    Names of a mixture are those after "model.layers.N.".
    """

    model_type: str
    class_name: str
    settings: Callable[[MoEConfig, LanguageModelConfig], dict[str, Any]]
    """What its configuration says beside what all have."""
    mixture: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of an expert's projections: gate, value and last."""
    biases: str = ""
    """Name of the biases of the choice; "": it has none."""
    shared: str = ""
    """Its shared experts, as one network; "": it has none."""
    shared_scale: float = 1.0
    """What their outputs are multiplied by before the sum."""
    interleaved: bool = False
    """Rotations turn neighbouring channels, where ours turn channel i with i + half."""


LLAMA = Architecture(
    "llama",
    "LlamaForCausalLM",
    settings=lambda _moe, _lm: {"attention_bias": False, "mlp_bias": False},
)
QWEN3 = Architecture(
    "qwen3",
    "Qwen3ForCausalLM",
    settings=lambda _moe, _lm: {"attention_bias": False, "use_sliding_window": False},
)
QWEN3_MOE = Architecture(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    settings=lambda moe, lm: {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "norm_topk_prob": moe.convention != "softmax_topk",
        "decoder_sparse_step": lm.moe_every,
        "attention_bias": False,
        "use_sliding_window": False,
    },
)
MIXTRAL = Architecture(
    "mixtral",
    "MixtralForCausalLM",
    settings=lambda moe, _lm: {
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "intermediate_size": moe.hidden,
        "sliding_window": None,
    },
    mixture="block_sparse_moe",
    projections=("w1", "w3", "w2"),
)
ERNIE = Architecture(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    settings=lambda moe, lm: {
        "moe_k": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "moe_num_experts": moe.experts,
        "moe_num_shared_experts": moe.shared_experts,
        "moe_layer_interval": lm.moe_every,
        "moe_layer_start_index": 0,
        "use_bias": False,
    },
    biases="moe_statics.e_score_correction_bias",
    shared="shared_experts",
    interleaved=True,
)
QWEN2 = Architecture(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    settings=lambda moe, lm: {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": moe.shared_experts * moe.hidden,
        "decoder_sparse_step": lm.moe_every,
        "qkv_bias": False,
    },
    shared="shared_expert",
    shared_scale=0.5,  # its gate of shared experts is sigmoid(x w), 1/2 for w = 0
)
GLM = Architecture(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    settings=lambda moe, lm: {
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "n_shared_experts": moe.shared_experts,
        "first_k_dense_replace": lm.moe_every - 1,  # dense blocks before the first mixture
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "partial_rotary_factor": 1.0,
        "use_qk_norm": lm.qk_norm,
        "attention_bias": False,
        "num_nextn_predict_layers": 0,
    },
    biases="gate.e_score_correction_bias",
    shared="shared_experts",
)


def architecture_of(config: Config) -> Architecture:
    """The plainest architecture that holds a folded config, which has no `misfits`."""
    moe, lm = config.moe, config.language_model
    if not lm.moe_every:
        return QWEN3 if lm.qk_norm else LLAMA
    if moe.convention == "sigmoid":
        return GLM
    if lm.qk_norm:
        return QWEN3_MOE
    if moe.convention == "softmax_topk":
        return QWEN2
    plain = lm.moe_every == 1 and not moe.shared_experts and not moe.balance.has_biases
    return MIXTRAL if plain else ERNIE


def misfits(config: Config) -> Iterator[str]:
    """What of a folded config no architecture holds: key, value and way out, a line each."""
    moe, lm = config.moe, config.language_model
    if moe.expert.kind != "swiglu":
        yield (
            f"moe.expert.kind {moe.expert.kind!r} is in no architecture: train with "
            "moe.expert.kind swiglu"
        )
    if lm.moe_every:
        yield from _misfits_of_layer(moe)
        yield from _misfits_of_gates(config)


def _misfits_of_layer(moe: MoEConfig) -> Iterator[str]:
    if moe.router.kind not in ("topk", "noisy_topk"):
        yield (
            f"moe.router.kind {moe.router.kind!r} is in no architecture: train with moe.router.kind"
            " topk"
        )
    for key, what in {"centre": "takes off a mean", "bias": "adds biases"}.items():
        if getattr(moe.router, key, False):
            yield (
                f"the router {what}, which no architecture does: train with moe.router.bias "
                "False, moe.router.centre False and moe.router.whiten.kind none"
            )
    if moe.dispatch != "sorted":
        yield f"moe.dispatch {moe.dispatch!r} is in no architecture: train with moe.dispatch sorted"
    if moe.capacity_factor:
        yield (
            f"moe.capacity_factor {moe.capacity_factor} drops tokens, which no architecture does: "
            "train with moe.capacity_factor 0"
        )
    if moe.expert_bias or moe.expert_out_bias:
        yield (
            "a bias after the experts is in no architecture: train with moe.expert_out_bias False "
            "and moe.expert_bias False"
        )


def _misfits_of_gates(config: Config) -> Iterator[str]:
    """What goes together in no one architecture."""
    moe, lm = config.moe, config.language_model
    if moe.convention == "softmax_topk" and moe.balance.has_biases:
        yield (
            f"moe.gates 'softmax_topk' with moe.balance.kind {moe.balance.kind!r} is in no "
            "architecture: train with moe.gates sigmoid or topk_softmax"
        )
    if (
        lm.qk_norm
        and moe.convention != "sigmoid"
        and (moe.shared_experts or moe.balance.has_biases)
    ):
        yield (
            "language_model.qk_norm True with shared experts or biases of the choice is in an "
            "architecture of sigmoid gates alone: train with moe.gates sigmoid, or with "
            "moe.shared_experts 0 and another moe.balance.kind than "
            f"{moe.balance.kind!r}"
        )
    if moe.convention == "sigmoid" and not _dense_blocks_come_first(config):
        yield (
            f"language_model.moe_every {lm.moe_every} with moe.gates 'sigmoid': dense blocks come "
            "first in that architecture: train with language_model.moe_every 1, or moe.gates "
            "topk_softmax"
        )


def settings_of(config: Config) -> dict[str, Any]:
    """Settings of the architecture's configuration, all but the ids of special tokens."""
    moe, lm = config.moe, config.language_model
    common = {
        "vocab_size": config.data.vocabulary,
        "hidden_size": lm.width,
        "num_hidden_layers": lm.layers,
        "num_attention_heads": lm.heads,
        "num_key_value_heads": lm.heads,
        "head_dim": lm.width // lm.heads,
        "intermediate_size": (moe.top_k + moe.shared_experts) * moe.hidden,
        "hidden_act": "silu",
        "max_position_embeddings": config.data.context,
        "rope_theta": ROTARY_BASE,
        "rms_norm_eps": EPSILON,
        "tie_word_embeddings": lm.tied_head,
    }
    return common | architecture_of(config).settings(moe, lm)


def weights_of(config: Config, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a folded model under the names of its architecture's checkpoints."""
    of = architecture_of(config)
    found = {
        "model.embed_tokens.weight": weights["embedding.weight"],
        "model.norm.weight": weights["norm.weight"],
    }
    if not config.language_model.tied_head:
        found["lm_head.weight"] = weights["head.weight"]
    for i in range(config.language_model.layers):
        block = _part(weights, f"blocks.{i}")
        layer = dict(_attention(of, block, config.language_model.heads))
        dense = "dense_norm.weight" in block
        norm = "dense_norm.weight" if dense else "moe_norm.weight"
        layer["post_attention_layernorm.weight"] = block[norm]
        network = _part(block, "dense" if dense else "moe")
        layer |= _network(network, "mlp") if dense else _mixture(of, network)
        found |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    # pieces of one tensor, which each have a place of their own in a file
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def _attention(
    of: Architecture, block: Mapping[str, Tensor], heads: int
) -> Iterator[tuple[str, Tensor]]:
    yield "input_layernorm.weight", block["attention_norm.weight"]
    yield "self_attn.o_proj.weight", block["attention.out.weight"]
    q, k, v = block["attention.qkv.weight"].chunk(3)
    yield "self_attn.v_proj.weight", v
    for name in ("q_norm", "k_norm"):
        if (gain := block.get(f"attention.{name}.weight")) is not None:
            yield f"self_attn.{name}.weight", gain
    for name, rows in (("q", q), ("k", k)):
        if of.interleaved:
            channels = len(rows) // heads
            halves = rows.view(heads, 2, channels // 2, -1)
            rows = halves.transpose(1, 2).reshape(rows.shape)
        yield f"self_attn.{name}_proj.weight", rows


def _mixture(of: Architecture, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {"gate.weight": layer["router.bank.base"]}
    experts = zip(layer["experts.up.base"], layer["experts.down.base"], strict=True)
    for i, (up, down) in enumerate(experts):
        parts = (*up.chunk(2), down.mT)
        for name, weight in zip(of.projections, parts, strict=True):
            found[f"experts.{i}.{name}.weight"] = weight
    if of.biases:
        experts_of = len(layer["router.bank.base"])
        biases = layer.get("router.selection.bias", torch.zeros(experts_of))
        found[of.biases] = biases[None] if of is ERNIE else biases
    if of.shared:
        found |= _shared(of, layer)
    return {f"{of.mixture}.{name}": tensor for name, tensor in found.items()}


def _shared(of: Architecture, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One network; of no channels where an architecture has it in any case."""
    width = layer["router.bank.base"].shape[1]
    part = _part(layer, "shared_experts")
    if not part and of is ERNIE:
        return {}
    if not part:
        nothing = layer["router.bank.base"].new_zeros(0, width)
        part = {"up.weight": nothing, "down.weight": nothing.mT}
    found = _network(part, of.shared)
    found[f"{of.shared}.down_proj.weight"] = part["down.weight"] / of.shared_scale
    if of is QWEN2:
        found["shared_expert_gate.weight"] = torch.zeros(1, width)
    return found


def _network(part: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    gate, value = part["up.weight"].chunk(2)
    return {
        f"{name}.gate_proj.weight": gate,
        f"{name}.up_proj.weight": value,
        f"{name}.down_proj.weight": part["down.weight"],
    }


def _part(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What lies under a name, by the rest of its own."""
    beginning = f"{name}."
    return {
        key.removeprefix(beginning): tensor
        for key, tensor in weights.items()
        if key.startswith(beginning)
    }


def _dense_blocks_come_first(config: Config) -> bool:
    lm = config.language_model
    return lm.moe_every == 1 or lm.layers == lm.moe_every
