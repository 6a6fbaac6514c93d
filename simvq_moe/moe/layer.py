"""A dropless mixture-of-experts layer with one shared map at the router, the inputs, the outputs.

y = (sum_i g_i E_i(x A^T)) W: the maps A and W are linear, so each is applied once a token, and
`fold` merges them, and the router's, into the experts: nothing of them remains at inference.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from simvq_moe.core.bank import Transform
from simvq_moe.core.streams import own_stream
from simvq_moe.core.usage import UsageCounter
from simvq_moe.moe.dispatch import dispatch
from simvq_moe.moe.experts import Experts
from simvq_moe.moe.router import Gates, Routing, TopKRouter


class MoE(nn.Module):
    """Tokens to their top_k of `experts` MLPs, weighted by gates.

    Args:
        width: channels of a token.
        hidden: channels inside an expert.
        experts: number of experts.
        top_k: experts of a token.
        gates: convention of the gates, see `TopKRouter`.
        router_map, router_base_width, train_router_base: bank of the router's rows, R = Q W.
        expert_out_map: map W after the gated sum (the conjecture that this project tests).
        expert_in_map: map A before the experts.

    Raises:
        ValueError: top_k > experts.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        top_k: int,
        *,
        gates: Gates = "topk_softmax",
        router_map: Transform = "none",
        router_base_width: int | None = None,
        train_router_base: bool = True,
        expert_out_map: Transform = "none",
        expert_in_map: Transform = "none",
    ) -> None:
        super().__init__()
        if top_k > experts:
            raise ValueError(f"top_k {top_k} > experts {experts}: lower top_k or raise experts")
        self.width, self.num_experts, self.top_k = width, experts, top_k
        with own_stream():
            self.router = TopKRouter(
                width,
                experts,
                top_k,
                gates=gates,
                transform=router_map,
                base_width=router_base_width,
                train_base=train_router_base,
            )
        self.experts = Experts(width, hidden, experts, in_map=expert_in_map, out_map=expert_out_map)
        self.counter = UsageCounter(experts, kind="experts", top_k=top_k)

    @property
    def usage(self) -> Tensor:
        """int64 (experts,): assignments counted since the window began."""
        return self.counter.counts

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.route_and_run(x)[0]

    def route_and_run(
        self, x: Float[Tensor, "*batch width"]
    ) -> tuple[Float[Tensor, "*batch width"], Routing]:
        """Outputs, and how the tokens, flattened, were routed."""
        flat = x.reshape(-1, self.width)
        routing = self.router(flat)
        self.counter.add(routing.ids)
        inputs = self.experts.up.pull(flat)
        summed = dispatch(inputs, routing.ids, routing.gates, self.experts, self.num_experts)
        return self.experts.down.map(summed).view(x.shape), routing

    @torch.no_grad()
    def fold(self) -> MoE:
        """The same layer without maps: each is merged into the rows that it maps."""
        folded = copy.deepcopy(self)
        folded.router.bank = self.router.bank.fold()
        folded.experts.up = self.experts.up.fold()
        folded.experts.down = self.experts.down.fold()
        return folded
