"""DeepSpeed's own MoE layer behind this package's interface: a baseline with padded capacity.

Its gate is a plain linear router whose gates sum to 1 for top_k > 1 and are the probability for
top_k = 1. Experts run on a dense (experts, capacity, width) tensor (GShard, arXiv:2006.16668); what
is over the capacity is dropped, or without one the capacity is that of the fullest expert.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.config.moe import ExpertOptions
from simvq_moe.core.streams import own_stream
from simvq_moe.core.usage import UsageCounter
from simvq_moe.moe.experts import GELU, FeedForward
from simvq_moe.moe.mixture import Mixture
from simvq_moe.moe.routers.base import Routing


class DeepSpeedCapacityMoE(Mixture):
    """`deepspeed.moe.layer.MoE` without its random choices, every expert started by itself.

    Args:
        width: channels of a token.
        hidden: channels inside an expert.
        experts: number of experts.
        top_k: experts of a token.
        expert: kind of the networks.
        capacity_factor: an expert takes at most this many times its fair share of this rank's
            batch; 0: as many as the fullest expert has.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        top_k: int,
        *,
        expert: ExpertOptions = GELU,
        capacity_factor: float = 0.0,
    ) -> None:
        super().__init__()
        self.width, self.num_experts, self.top_k = width, experts, top_k
        with torch.random.fork_rng(devices=[]):  # only `reset` draws, as many as for our layer
            self.inner = DeepSpeedMoE(
                width,
                FeedForward(width, hidden, expert=expert),
                experts,
                k=top_k,
                capacity_factor=capacity_factor,
                eval_capacity_factor=capacity_factor,
                min_capacity=0,
                drop_tokens=capacity_factor > 0,
                use_rts=False,
                top2_2nd_expert_sampling=False,
            )
        self.inner.deepspeed_moe.gate.register_forward_hook(self._remember)
        self.routes = torch.zeros(top_k, 0, dtype=torch.int32)
        self.reset(width**-0.5, hidden**-0.5)
        self.counter = UsageCounter(experts, kind="experts", top_k=top_k)
        self.kept = UsageCounter(experts, kind="kept", top_k=top_k)

    @property
    def usage(self) -> Tensor:
        """int64 (experts,): assignments counted since the window began, before the capacity."""
        return self.counter.counts

    @property
    def router_rows(self) -> Tensor:
        """(experts, width): rows of the gate."""
        gate: Any = self.inner.deepspeed_moe.gate
        return gate.wg.weight

    def forward(
        self,
        x: Float[Tensor, "*batch width"],
        token_ids: Int[Tensor, "*batch"] | None = None,
        *,
        with_routing: bool = False,
    ) -> Float[Tensor, "*batch width"] | tuple[Float[Tensor, "*batch width"], Routing]:
        """Outputs, and on request how the tokens, flattened, were routed."""
        flat = self.flattened(x, token_ids)[0].float()
        y, _, _ = self.inner(x)
        # the gate keeps its logits to itself; these are the same
        logits = flat @ self.router_rows.float().T
        top = logits.topk(self.top_k)
        gates = logits.softmax(-1).gather(-1, top.indices)
        if self.top_k > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        self.counter.add(top.indices)
        self.kept.add(self.routes.to(torch.int64))
        routing = Routing(top.indices, gates, logits, {})
        return (y, routing) if with_routing else y

    def rows_of_products(self) -> Float[Tensor, "experts width"]:
        return self.router_rows

    def expert_outputs(
        self, x: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, "experts tokens width"]:
        experts: Any = self.inner.deepspeed_moe.experts
        return torch.stack([expert(x) for expert in experts.deepspeed_experts])

    @torch.no_grad()
    def reset(self, std: float, ending_std: float) -> None:
        """Start again: rows of the gate and first projections from N(0, std), last ones from
        N(0, ending_std); the same numbers as `MoE` draws."""
        experts: Any = self.inner.deepspeed_moe.experts
        inner = list(experts.deepspeed_experts)
        up = torch.stack([expert.up.weight for expert in inner]).normal_(std=std)
        # ours are stored as (hidden, width)
        down = torch.stack([expert.down.weight.T for expert in inner]).contiguous()
        down.normal_(std=ending_std)
        for i, expert in enumerate(inner):
            expert.up.weight.copy_(up[i])
            expert.down.weight.copy_(down[i].T)
        with own_stream():
            self.router_rows.normal_(std=std)

    def _remember(self, gate: nn.Module, inputs: Any, output: Any) -> None:
        del gate, inputs
        self.routes = output[3]
