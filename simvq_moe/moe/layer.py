"""A mixture-of-experts layer with a map at the router, the inputs, the outputs, or none.

y = (sum_i g_i E_i(x A^T)) W: shared maps A and W are linear, so each is applied once a token, and
`fold` merges them, and the router's, into the rows: nothing of them remains at inference.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from simvq_moe.config.moe import (
    BalanceOptions,
    ExpertOptions,
    Gates,
    MapOptions,
    MoEConfig,
    RouterOptions,
)
from simvq_moe.config.registry import as_options
from simvq_moe.core.choices import check_choice, check_none
from simvq_moe.core.precision import full_precision
from simvq_moe.core.streams import own_stream
from simvq_moe.core.usage import UsageCounter
from simvq_moe.hub import Pretrained
from simvq_moe.moe.dispatch import dispatch, within_capacity
from simvq_moe.moe.experts import Experts, FeedForward
from simvq_moe.moe.maps import NoMap
from simvq_moe.moe.mixture import Mixture
from simvq_moe.moe.routers.base import Router, Routing

if TYPE_CHECKING:
    from simvq_moe.moe.deepspeed_baseline import DeepSpeedCapacityMoE


class MoE(Pretrained, Mixture):
    """Tokens to their top_k of `experts` networks, weighted by gates.

    A part is given by its options, or by the word for its kind with the defaults of that kind:
    `MoE(512, 1024, 64, 2, router="cosine", balance=LossFreeBalance(rate=0.01))`.

    Args:
        width: channels of a token.
        hidden: channels inside an expert.
        experts: number of experts.
        top_k: experts of a token.
        expert: what each expert is, see `expert_kinds`.
        shared_experts: experts of the same size that every token goes through beside its choice,
            outside of the maps (DeepSeekMoE, arXiv:2401.06066, section 3.2).
        router: how experts are chosen, see `routers`. Call `after_step` after each optimizer step
            if its input is centred or whitened. If data start it, it waits for `start_from_data`.
        gates: convention of the gates, see `Router`; "default": see `RouterOptions.default_gates`.
        balance: what evens out their use, see `balances`; call `after_step` here too if it has
            biases. Its loss is one of the model, see `losses`.
        expert_out_map: map W after the gated sum (the conjecture that this project tests).
        expert_out_bias: one learned vector added to every token's sum.
        expert_bias: one learned vector added to each expert's outputs, which `fold` makes of that.
        expert_in_map: map A before the experts.
        capacity_factor: an expert takes at most this many times its fair share of this rank's
            batch, the rest is dropped and counted; 0: dropless.
        expert_parallel: ranks that share the experts, see `ParallelExperts`; 1: every rank has all.
        vocabulary: number of vocabulary ids, for routers that go by them.

    Raises:
        ValueError: a kind is unknown, parts do not go together, or experts do not divide over
            ranks.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        top_k: int,
        *,
        expert: str | ExpertOptions = "gelu",
        shared_experts: int = 0,
        router: str | RouterOptions = "topk",
        gates: Gates | Literal["default"] = "default",
        balance: str | BalanceOptions = "none",
        expert_out_map: str | MapOptions = "none",
        expert_out_bias: bool = False,
        expert_bias: bool = False,
        expert_in_map: str | MapOptions = "none",
        capacity_factor: float = 0.0,
        expert_parallel: int = 1,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("gates", gates, Literal["default", Gates])
        options = MoEConfig(
            experts=experts,
            top_k=top_k,
            hidden=hidden,
            expert=as_options(ExpertOptions, expert, "expert"),
            shared_experts=shared_experts,
            capacity_factor=capacity_factor,
            router=as_options(RouterOptions, router, "router"),
            gates=gates,
            balance=as_options(BalanceOptions, balance, "balance"),
            expert_in_map=as_options(MapOptions, expert_in_map, "expert_in_map"),
            expert_out_map=as_options(MapOptions, expert_out_map, "expert_out_map"),
            expert_out_bias=expert_out_bias,
            expert_bias=expert_bias,
            expert_parallel=expert_parallel,
        )
        _check(options, width)
        self._build(width, options, vocabulary)

    def _build(self, width: int, layer: MoEConfig, vocabulary: int | None) -> None:
        self.width, self.num_experts, self.top_k = width, layer.experts, layer.top_k
        self.capacity_factor = layer.capacity_factor
        with own_stream():
            self.router: Router = layer.router.build(width, layer, vocabulary)
        self.router.selection = layer.balance.biases(layer.experts, layer.top_k)
        self.experts = _experts(width, layer, self.router)
        self.shared_experts: FeedForward | None = None
        if layer.shared_experts:
            hidden = layer.shared_experts * layer.hidden
            with torch.random.fork_rng(devices=[]):  # the same weights elsewhere with and without
                self.shared_experts = FeedForward(width, hidden, expert=layer.expert)
        self.counter = UsageCounter(layer.experts, kind="experts", top_k=layer.top_k)
        self.kept: UsageCounter | None = None
        """Counts after the capacity."""
        if layer.capacity_factor:
            self.kept = UsageCounter(layer.experts, kind="kept", top_k=layer.top_k)

    @property
    def usage(self) -> Tensor:
        """int64 (experts,): assignments counted since the window began, before any capacity."""
        return self.counter.counts

    def forward(
        self,
        x: Float[Tensor, "*batch width"],
        token_ids: Integer[Tensor, "*batch"] | None = None,
        *,
        with_routing: bool = False,
    ) -> Float[Tensor, "*batch width"] | tuple[Float[Tensor, "*batch width"], Routing]:
        """Outputs, and on request how the tokens, flattened, were routed.

        Args:
            token_ids: vocabulary ids of the tokens, for routers that go by them.
        """
        flat, ids = self.flattened(x, token_ids)
        seen = self.router.enter(flat)
        routing = self.router(seen, ids)
        self.counter.add(routing.ids)
        ids = routing.ids
        if self.kept is not None:
            ids = within_capacity(ids, self.num_experts, self.capacity_factor)
            self.kept.add(ids)
        keys = None if self.router.keys is None else self.router.keys.base
        summed = dispatch(
            self.experts.enter(seen),
            ids,
            routing.gates,
            partial(self.experts, keys=keys),
            self.num_experts,
            open_choices=self.kept is not None or self.router.leaves_open,
        )
        y = self.experts.leave(summed)
        if self.shared_experts is not None:
            y = y + self.shared_experts(flat)
        y = y.view(x.shape)
        return (y, routing) if with_routing else y

    def rows_of_products(self) -> Float[Tensor, "experts width"] | None:
        return self.router.rows_of_products()

    def expert_outputs(
        self, x: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, "experts tokens width"]:
        keys = None if self.router.keys is None else self.router.keys.base
        rows = self.experts.enter(self.router.enter(x)).repeat(self.num_experts, 1)
        counts = torch.full((self.num_experts,), len(x), dtype=torch.int64, device=x.device)
        return self.experts(rows, counts, keys).view(self.num_experts, len(x), -1)

    @torch.no_grad()
    def reset(self, std: float, ending_std: float) -> None:
        """Start again from N(0, std): the router's rows of that scale, and the first projections;
        the last projections from N(0, ending_std)."""
        self.experts.reset(std, ending_std)
        with own_stream():
            self.router.reset(std)
        if self.shared_experts is not None:
            with torch.random.fork_rng(devices=[]):
                self.shared_experts.reset(std, ending_std)

    @torch.no_grad()
    def fold(self) -> MoE:
        """The same layer without maps: each is merged into the rows that it maps.

        Raises:
            ValueError: a bias after experts whose gates do not sum to 1, or with a capacity.
        """
        if self.experts.out_bias is not None:
            if not self.router.gates_sum_to_one:
                raise ValueError(
                    f"expert_out_bias with gates {self.router.gates!r} can't be folded: b becomes "
                    "each expert's own only where a token's gates sum to 1: use 'topk_softmax'"
                )
            if self.kept is not None:
                raise ValueError(
                    f"expert_out_bias with capacity_factor {self.capacity_factor} can't be "
                    "folded: dropped assignments would drop their part of b: use 0"
                )
        folded = copy.deepcopy(self)
        with full_precision():
            folded.experts.fold_(folded.router.keys)
            folded.router.fold_()
        folded.train(self.training)
        # what `save_pretrained` builds it from again
        router = as_options(RouterOptions, self.arguments.get("router", "topk"), "router")
        plain: dict[str, Any] = {"expert_out_map": "none", "expert_in_map": "none"}
        folded.arguments = self.arguments | plain | {"router": router.folded()}
        if self.experts.out_bias is not None:
            folded.arguments |= {"expert_bias": True, "expert_out_bias": False}
        return folded


def _check(options: MoEConfig, width: int) -> None:
    check_none(options.misfits(width))
    if options.gate_teaches_nothing:
        warnings.warn(
            f"top_k 1 with gates {options.convention!r}: the one gate is always 1, so that router "
            f"{options.router.kind!r} learns nothing from the layer's output: use gates "
            "'softmax_topk'",
            stacklevel=4,
        )


def _experts(width: int, options: MoEConfig, router: Router) -> Experts:
    sizes = width, options.hidden, options.experts
    in_map, key_rank = options.expert_in_map, 0
    if router.keys is not None:  # the keys' map comes before both
        in_map, key_rank = NoMap(train_base=in_map.train_base), router.keys.base.shape[1]
    networks: dict[str, Any] = {
        "expert": options.expert,
        "in_map": in_map,
        "out_map": options.expert_out_map,
        "out_bias": options.expert_out_bias,
        "bias": options.expert_bias,
        "key_rank": key_rank,
    }
    if options.expert_parallel == 1:
        return Experts(*sizes, **networks)
    # imported here, because it takes DeepSpeed and a process group
    from simvq_moe.moe.expert_parallel import parallel_experts

    return parallel_experts(*sizes, expert_parallel=options.expert_parallel, **networks)


def build_mixture(
    width: int, options: MoEConfig, vocabulary: int | None = None
) -> MoE | DeepSpeedCapacityMoE:
    """A layer from its options: ours, or DeepSpeed's own as a baseline.

    Args:
        width: channels of a token.
        vocabulary: number of vocabulary ids, for routers that go by them.
    """
    if options.dispatch == "deepspeed_capacity":
        from simvq_moe.moe.deepspeed_baseline import DeepSpeedCapacityMoE

        sizes = width, options.hidden, options.experts, options.top_k
        return DeepSpeedCapacityMoE(
            *sizes, expert=options.expert, capacity_factor=options.capacity_factor
        )
    same = {f.name: getattr(options, f.name) for f in fields(options)}
    del same["dispatch"], same["z_loss_weight"]
    return MoE(width, vocabulary=vocabulary, **same)


def build_dense(width: int, options: MoEConfig) -> FeedForward:
    """One network as large as all experts that a token meets in such a mixture."""
    met = options.top_k + options.shared_experts
    return FeedForward(width, met * options.hidden, expert=options.expert)
