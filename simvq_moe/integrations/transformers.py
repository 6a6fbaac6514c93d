"""Shared maps and usage meters inside the mixture-of-experts models of `transformers`.

`add_shared_maps` works in place, by forward hooks: no parameter of the model moves or changes its
name, and maps start as the identity, so that step 0 gives the plain model's logits to the bit.
`fold` merges every map into the model's own weights and takes the hooks away: what is left is a
plain checkpoint. Per block, with rows mapped as in `Bank`:

    logits = x (Q W_r)^T        E_i(x W_in^T)        y = shared(x) + (sum_i g_i E_i) W_out

A router's input may be whitened as well, see `Whitening`. These routers have no biases, so moments
are about 0, where the map folds into the rows alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from simvq_moe.core.bank import Bank, Transform
from simvq_moe.core.choices import check_choice
from simvq_moe.core.step_state import after_step
from simvq_moe.core.streams import own_stream
from simvq_moe.core.whitening import Whitening, WhiteningKind, build_whitening
from simvq_moe.integrations.meters import meter, unmeter
from simvq_moe.integrations.meters import usage_by_layer as usage_by_layer

try:
    from transformers import PreTrainedModel, TrainerCallback
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
except ImportError as error:
    raise ImportError(f"{error}: needs transformers>=5, pip install 'simvq-moe[hf]'") from error

BLOCKS = (MixtralSparseMoeBlock, OlmoeSparseMoeBlock, Qwen3MoeSparseMoeBlock, DeepseekV3MoE)
SUPPORTED = "Mixtral, OLMoE, Qwen3-MoE and DeepSeek-V3"
MAPS = "shared_maps."
"""Prefix of all that is added to a model."""
WEIGHTS = {
    "router": "gate.weight",
    "expert_in": "experts.gate_up_proj",
    "expert_out": "experts.down_proj",
}
"""The weight of a block that each site's map folds into."""


class SharedMap(Bank):
    """The map of a bank whose rows stay where the model has them.

    Args:
        like: a weight of the model, for dtype and device.
        width: channels of a token.
        transform, rank: see `Bank`.
        adjoint: for rows that meet a token in a product: x W^T; otherwise for sums of rows: x W.
    """

    def __init__(
        self, like: Tensor, width: int, transform: Transform, rank: int, *, adjoint: bool
    ) -> None:
        no_rows = torch.empty(0, width, dtype=like.dtype)
        super().__init__(no_rows, transform=transform, train_base=False, rank=rank)
        self.register_buffer("base", no_rows, persistent=False)
        self.adjoint = adjoint
        self.to(like.device)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return (self.pull(x) if self.adjoint else self.map(x)).to(x.dtype)

    @torch.no_grad()
    def fold_into(self, weight: Tensor) -> None:
        """Map each row of a weight in place; columns, where they are what is summed.

        In float64, which no setting of matrix products makes less exact, and one expert at a time,
        for a whole stack may not fit.
        """
        for expert in weight:
            rows = expert if self.adjoint else expert.mT
            rows.copy_(self.map(rows.double()))


class BlockMaps(nn.Module):
    """Maps of one block, and the hooks that bring them in.

    Hooks are bound methods, so that a deep copy of the model runs on maps of its own.
    """

    def __init__(
        self,
        block: nn.Module,
        transforms: dict[str, Transform],
        rank: int,
        whitening: dict[str, Any] | None,
    ) -> None:
        super().__init__()
        width = block.get_parameter(WEIGHTS["router"]).shape[1]

        def shared_map(site: str) -> SharedMap | None:
            if transforms[site] == "none":
                return None
            weight = block.get_parameter(WEIGHTS[site])
            with own_stream():
                return SharedMap(
                    weight, width, transforms[site], rank, adjoint=site != "expert_out"
                )

        self.router = shared_map("router")
        self.expert_in = shared_map("expert_in")
        self.expert_out = shared_map("expert_out")
        self.whitening: Whitening | None = None
        if whitening is not None:
            self.whitening = build_whitening(width=width, centred=False, **whitening)
            self.whitening.to(block.get_parameter(WEIGHTS["router"]).device)
        self.frozen: list[str] = []
        """Sites whose weight was learned before and is not beside its map."""
        gate, networks = block.get_submodule("gate"), block.get_submodule("experts")
        self.hooks = []
        if self.expert_in is not None:
            self.hooks.append(networks.register_forward_pre_hook(self._before_experts))
        if self.router is not None or self.whitening is not None:
            self.hooks.append(gate.register_forward_pre_hook(self._before_router))
        if self.expert_out is not None:
            self.hooks.append(networks.register_forward_hook(self._after_experts))

    def _before_router(self, gate: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        del gate
        x = args[0]
        if self.whitening is not None:
            flat = x.reshape(-1, x.shape[-1])
            self.whitening.collect(flat.detach())
            wide = torch.promote_types(x.dtype, torch.float32)
            x = self.whitening.turn(flat.to(wide)).to(x.dtype).view(x.shape)
        return (x if self.router is None else self.router(x), *args[1:])

    def _before_experts(self, experts: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        del experts
        assert self.expert_in is not None
        return (self.expert_in(args[0]), *args[1:])

    def _after_experts(self, experts: nn.Module, args: tuple[Any, ...], summed: Tensor) -> Tensor:
        del experts, args
        assert self.expert_out is not None
        return self.expert_out(summed)

    def freeze(self, block: nn.Module, sites: list[str]) -> None:
        """No longer learn the weights of these sites, until `fold_into`."""
        for site in sites:
            weight = block.get_parameter(WEIGHTS[site])
            if weight.requires_grad:
                weight.requires_grad_(False)
                self.frozen.append(site)

    def fold_into(self, block: nn.Module) -> None:
        """Merge the maps into a block and leave it as it came."""
        for site, name in WEIGHTS.items():
            shared_map = getattr(self, site)
            if shared_map is not None:
                shared_map.fold_into(block.get_parameter(name))
        if self.whitening is not None:
            rows = block.get_parameter(WEIGHTS["router"])
            with torch.no_grad():
                rows.copy_(self.whitening.fold(rows.double())[0])
        for site in self.frozen:
            block.get_parameter(WEIGHTS[site]).requires_grad_(True)
        for hook in self.hooks:
            hook.remove()


def add_shared_maps(
    model: PreTrainedModel,
    *,
    expert_out_map: Transform = "linear",
    train_expert_out_base: bool = True,
    expert_in_map: Transform = "none",
    train_expert_in_base: bool = True,
    router_map: Transform = "none",
    train_router_base: bool = True,
    map_rank: int = 8,
    whiten_router_input: Literal["none"] | WhiteningKind = "none",
    whitening_exponent: float = 1.0,
    whitening_decay: float = 0.99,
    whitening_floor: float = 0.01,
    whitening_every: int = 10,
    whitening_rank: int = 32,
) -> None:
    """Add maps to every MoE block of a model, in place, and `meter` it; before the optimizer.

    Maps have the dtype and device of the weights they belong to, and are parameters of
    `model.shared_maps`, one entry a block.

    `save_pretrained` of such a model keeps the maps, and `config.shared_maps` says which they are.
    `from_pretrained` alone drops them and reports `shared_maps...` as unexpected: follow it with
    `load_shared_maps`, or save after `fold`.

    Args:
        model: a Mixtral, OLMoE, Qwen3-MoE or DeepSeek-V3 model with whole, unquantized weights.
        expert_out_map: map W after the gated sum of routed experts; shared experts stay outside.
        expert_in_map: map A before routed experts, E_i(x A^T).
        router_map: map of the router's rows Q, logits = x (Q W)^T.
        train_expert_out_base, train_expert_in_base, train_router_base: learn the model's own
            `down_proj`, `gate_up_proj` or router rows beside a map.
        map_rank: rank of maps of kind "low_rank".
        whiten_router_input, whitening_exponent, whitening_decay, whitening_floor, whitening_every,
            whitening_rank: as of `MoE`, but about 0 instead of the mean, because these routers have
            no biases to fold a mean into. Call `after_step(model)` after each optimizer step, or
            give transformers' Trainer an `AfterStep`.

    Raises:
        ValueError: the architecture is unknown; the model has maps; a map is "separate";
            weights are quantized or split over devices.
    """
    settings: dict[str, Any] = dict(locals())  # the arguments
    del settings["model"]
    whitening: dict[str, Any] | None = None
    if whiten_router_input != "none":
        names = ("exponent", "decay", "floor", "every", "rank")
        whitening = {"kind": whiten_router_input}
        whitening |= {name: settings[f"whitening_{name}"] for name in names}
    blocks = moe_blocks(model)
    transforms = {site: settings[f"{site}_map"] for site in WEIGHTS}
    _check_maps(model, transforms)
    frozen = [site for site in WEIGHTS if not settings[f"train_{site}_base"]]
    meter(model)
    model.shared_maps = nn.ModuleList()
    with torch.random.fork_rng(devices=[]):  # numbers drawn later are those of the plain model
        for block in blocks.values():
            maps = BlockMaps(block, transforms, map_rank, whitening)
            maps.freeze(block, frozen)
            model.shared_maps.append(maps)
    model.shared_maps.train(model.training)
    model.config.shared_maps = settings


class AfterStep(TrainerCallback):
    """A callback of transformers' Trainer: whitening follows every optimizer step."""

    def on_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        after_step(model)


def _check_maps(model: PreTrainedModel, transforms: dict[str, Transform]) -> None:
    """Raise `ValueError` for a model that has maps, or maps that are not shared."""
    if getattr(model.config, "shared_maps", None) is not None:
        way_out = (
            "use load_shared_maps(model, directory)"
            if getattr(model, "shared_maps", None) is None
            else "fold(model) merges them first"
        )
        raise ValueError(f"this {type(model).__name__} comes with shared maps: {way_out}")
    for site, transform in transforms.items():
        check_choice(f"{site}_map", transform, Transform)
        if transform == "separate":
            raise ValueError(f"{site}_map 'separate' is not shared: use 'linear' or 'low_rank'")


def load_shared_maps(model: PreTrainedModel, directory: str | Path) -> None:
    """Put maps saved by `save_pretrained` back into a model just loaded from that directory.

    Raises:
        ValueError: the model's config names no shared maps.
    """
    settings = getattr(model.config, "shared_maps", None)
    if settings is None or getattr(model, "shared_maps", None) is not None:
        raise ValueError(
            f"load_shared_maps: nothing to load for this {type(model).__name__}: it must come "
            "from from_pretrained on a directory saved with maps"
        )
    config: Any = model.config
    del config.shared_maps
    add_shared_maps(model, **settings)
    tensors: dict[str, Tensor] = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(MAPS)]  # noqa: SIM118
            tensors |= {name.removeprefix(MAPS): file.get_tensor(name) for name in names}
    model.get_submodule("shared_maps").load_state_dict(tensors)


def fold(model: PreTrainedModel) -> None:
    """Merge every map into the model's own weights, in place, and take maps and meters away.

    The parameters stay the same objects; those that `add_shared_maps` froze learn again.

    Raises:
        ValueError: the model has no maps.
    """
    for maps, block in zip(_maps_of(model), moe_blocks(model).values(), strict=True):
        maps.fold_into(block)
    config: Any = model.config
    del model.shared_maps, config.shared_maps
    unmeter(model)


def moe_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The MoE blocks of a model by name, first layer first; meters are in the same order.

    Raises:
        ValueError: there is none that is known, or its weights are quantized or split.
    """
    blocks: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, BLOCKS)
    }
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no MoE block that is known: use a model of {SUPPORTED}"
        )
    for name, block in blocks.items():
        for weight in block.parameters():
            if isinstance(weight, DTensor):
                raise ValueError(f"{name} is split over devices: use a model with whole weights")
            if not weight.is_floating_point() or weight.element_size() < 2:
                raise ValueError(f"{name} has {weight.dtype} weights: load the model in bfloat16")
    return blocks


def _maps_of(model: PreTrainedModel) -> list[BlockMaps]:
    every = getattr(model, "shared_maps", None)
    if every is None:
        raise ValueError(
            f"this {type(model).__name__} has no shared maps: add_shared_maps(model) adds them"
        )
    return [maps for maps in every if isinstance(maps, BlockMaps)]
