"""A mixture-of-experts layer with a map at the router, the inputs, the outputs, or none.

y = (sum_i g_i E_i(x A^T)) W: shared maps A and W are linear, so each is applied once a token, and
`fold` merges them, and the router's, into the experts: nothing of them remains at inference.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from simvq_moe.core.bank import Transform
from simvq_moe.core.choices import check_choice
from simvq_moe.core.ids import as_ids
from simvq_moe.core.streams import own_stream
from simvq_moe.core.usage import UsageCounter
from simvq_moe.core.whitening import Whitening, WhiteningKind
from simvq_moe.hub import Pretrained
from simvq_moe.moe.dispatch import dispatch, within_capacity
from simvq_moe.moe.experts import ExpertKind, Experts, FeedForward
from simvq_moe.moe.routers.base import Gates, Router, Routing, default_gates
from simvq_moe.moe.routers.build import Balance, RouterInit, RouterKind, build_router

if TYPE_CHECKING:
    from simvq_moe.moe.deepspeed_baseline import DeepSpeedCapacityMoE


Dispatch = Literal["sorted", "deepspeed_capacity"]

WITHOUT_MAPS: dict[str, Any] = {
    "router_map": "none",
    "router_base_width": None,
    "train_router_base": True,
    "router_init": "default",
    "whiten_router_input": "none",
    "expert_out_map": "none",
    "train_expert_out_base": True,
    "expert_out_bias": False,
    "expert_in_map": "none",
    "train_expert_in_base": True,
}
"""Arguments of a folded layer."""


class MoE(Pretrained):
    """Tokens to their top_k of `experts` networks, weighted by gates.

    Args:
        width: channels of a token.
        hidden: channels inside an expert.
        experts: number of experts.
        top_k: experts of a token.
        expert: "gelu" or "swiglu", see `Experts`.
        shared_experts: experts of the same size that every token goes through beside its choice,
            outside of the maps (DeepSeekMoE, arXiv:2401.06066, section 3.2).
        router: how experts are chosen, see `routers`.
        gates: convention of the gates, see `Router`; "default": see `default_gates`.
        router_map, router_base_width, train_router_base: bank of the router's rows, R = Q W.
        router_projection: channels of the prototypes of router "cosine", see `CosineRouter`.
        router_init: "data": the maps of routers "distance" and "self_selecting" wait for
            `start_from_data`.
        self_selecting_rank: rows of an expert's key, see `SelfSelectingRouter`.
        vocabulary: number of vocabulary ids, for router "hash".
        router_bias: add one learned number an expert to the logits of a router that scores by
            products.
        centre_router_input: take a running mean off the router's input, see `RunningMean`; call
            `after_step` after each optimizer step.
        whiten_router_input: "full", "diagonal" or "low_rank": what a router that scores by products
            sees is whitened, see `Whitening`; call `after_step` here too.
        whitening_exponent, whitening_decay, whitening_floor, whitening_every: see `Whitening`.
        whitening_rank: directions of "low_rank".
        balance: "loss_free" or "quantile": biases of the choice, see `selection_bias`; call
            `after_step` here too. "aux" is a loss of the model, see `balance`.
        bias_update_rate: step of the biases of "loss_free".
        expert_out_map, train_expert_out_base: map W after the gated sum (the conjecture that this
            project tests) and whether the last projections learn beside it.
        expert_out_bias: one learned vector added to every token's sum.
        expert_bias: one learned vector added to each expert's outputs, which `fold` makes of that.
        expert_in_map, train_expert_in_base: map A before the experts, and their first projections.
        map_rank: rank of maps of kind "low_rank".
        capacity_factor: an expert takes at most this many times its fair share of this rank's
            batch, the rest is dropped and counted; 0: dropless.
        expert_parallel: ranks that share the experts, see `ParallelExperts`; 1: every rank has all.

    Raises:
        ValueError: top_k > experts, or experts that do not divide over ranks.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        top_k: int,
        *,
        expert: ExpertKind = "gelu",
        shared_experts: int = 0,
        router: RouterKind = "topk",
        gates: Gates | Literal["default"] = "default",
        router_map: Transform = "none",
        router_base_width: int | None = None,
        train_router_base: bool = True,
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
        expert_out_map: Transform = "none",
        train_expert_out_base: bool = True,
        expert_out_bias: bool = False,
        expert_bias: bool = False,
        expert_in_map: Transform = "none",
        train_expert_in_base: bool = True,
        map_rank: int = 8,
        capacity_factor: float = 0.0,
        expert_parallel: int = 1,
    ) -> None:
        super().__init__()
        if top_k > experts:
            raise ValueError(f"top_k {top_k} > experts {experts}: lower top_k or raise experts")
        check_choice("expert_out_map", expert_out_map, Transform)
        if gates == "default":
            gates = default_gates(router, experts, top_k)
        self.width, self.num_experts, self.top_k = width, experts, top_k
        self.capacity_factor = capacity_factor
        with own_stream():
            self.router: Router = build_router(
                router,
                width,
                experts,
                top_k,
                gates=gates,
                router_map=router_map,
                router_base_width=router_base_width,
                train_router_base=train_router_base,
                expert_in_map=expert_in_map,
                map_rank=map_rank,
                router_projection=router_projection,
                router_init=router_init,
                self_selecting_rank=self_selecting_rank,
                vocabulary=vocabulary,
                router_bias=router_bias,
                centre_router_input=centre_router_input,
                whiten_router_input=whiten_router_input,
                whitening_exponent=whitening_exponent,
                whitening_decay=whitening_decay,
                whitening_floor=whitening_floor,
                whitening_every=whitening_every,
                whitening_rank=whitening_rank,
                balance=balance,
                bias_update_rate=bias_update_rate,
            )
        selves = router == "self_selecting"
        self.experts = _experts(
            width,
            hidden,
            experts,
            kind=expert,
            in_map="none" if selves else expert_in_map,  # the keys' map comes before both
            key_rank=self_selecting_rank if selves else 0,
            out_map=expert_out_map,
            train_in_base=train_expert_in_base,
            train_out_base=train_expert_out_base,
            out_bias=expert_out_bias,
            bias=expert_bias,
            map_rank=map_rank,
            expert_parallel=expert_parallel,
        )
        self.shared_experts: FeedForward | None = None
        if shared_experts:
            with torch.random.fork_rng(devices=[]):  # the same weights elsewhere with and without
                self.shared_experts = FeedForward(width, shared_experts * hidden, kind=expert)
        self.counter = UsageCounter(experts, kind="experts", top_k=top_k)
        self.kept: UsageCounter | None = None
        """Counts after the capacity."""
        if capacity_factor:
            self.kept = UsageCounter(experts, kind="kept", top_k=top_k)

    @property
    def usage(self) -> Tensor:
        """int64 (experts,): assignments counted since the window began, before any capacity."""
        return self.counter.counts

    def forward(
        self,
        x: Float[Tensor, "*batch width"],
        token_ids: Integer[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch width"]:
        return self.route_and_run(x, token_ids)[0]

    def route_and_run(
        self,
        x: Float[Tensor, "*batch width"],
        token_ids: Integer[Tensor, "*batch"] | None = None,
    ) -> tuple[Float[Tensor, "*batch width"], Routing]:
        """Outputs, and how the tokens, flattened, were routed.

        Args:
            token_ids: vocabulary ids of the tokens, for routers that go by them.
        """
        flat = x.reshape(-1, self.width)
        seen = self.router.enter(flat)
        ids = None if token_ids is None else as_ids(token_ids, "token_ids").reshape(-1)
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
        return y.view(x.shape), routing

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
        folded.experts.fold_(folded.router.keys)
        folded.router.fold_()
        # what `save_pretrained` builds it from again
        folded.arguments = self.arguments | WITHOUT_MAPS
        if self.experts.out_bias is not None:
            folded.arguments["expert_bias"] = True
        if isinstance(self.router.centre, Whitening):
            folded.arguments["router_bias"] = True
        return folded


def _experts(
    width: int, hidden: int, experts: int, *, expert_parallel: int, **options: Any
) -> Experts:
    if expert_parallel == 1:
        return Experts(width, hidden, experts, **options)
    # imported here, for it takes DeepSpeed and a process group
    from simvq_moe.moe.expert_parallel import parallel_experts

    return parallel_experts(width, hidden, experts, expert_parallel=expert_parallel, **options)


def build_moe(
    width: int, *, dispatch: Dispatch = "sorted", **options: Any
) -> MoE | DeepSpeedCapacityMoE:
    """A layer from its options: ours, or DeepSpeed's own as a baseline."""
    check_choice("dispatch", dispatch, Dispatch)
    if dispatch == "sorted":
        return MoE(width, **options)
    from simvq_moe.moe.deepspeed_baseline import DeepSpeedCapacityMoE

    names = ("hidden", "experts", "top_k", "expert", "capacity_factor")
    return DeepSpeedCapacityMoE(width, **{name: options[name] for name in names})
