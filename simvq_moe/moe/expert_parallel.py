"""Experts split over ranks: tokens travel to their experts and back (GShard, arXiv:2006.16668).

Rank r of an expert-parallel group of E ranks holds the r-th E-th of a layer's experts. The number
of rows that two ranks exchange is what was chosen: nothing is padded, and a rank without tokens
joins every exchange with none. Groups and gradient averages are DeepSpeed's: an expert's gradient
is summed over the ranks that hold it and divided by all ranks, like every mean over the global
batch; maps, router and shared experts are ordinary parameters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import groups
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.config.moe import MapOptions
from simvq_moe.moe.experts import Experts


class ParallelExperts(Experts):
    """`Experts` of which this rank holds a part; every rank of the group must call it together.

    Args:
        width, hidden, experts: see `Experts`; experts of all ranks.
        expert_parallel: ranks that share the experts.
        options: further arguments of `Experts`.

    Raises:
        ValueError: the ranks do not divide into groups, or the experts over a group.
    """

    def __init__(
        self, width: int, hidden: int, experts: int, *, expert_parallel: int, **options: Any
    ) -> None:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks % expert_parallel or experts % expert_parallel:
            raise ValueError(
                f"expert_parallel {expert_parallel} must divide {ranks} ranks and {experts} "
                "experts: change one of them"
            )
        self.group_name = make_groups(expert_parallel)
        rank = dist.get_rank(self.group)
        super().__init__(width, hidden, experts, part=(rank, expert_parallel), **options)
        for bank in self.banks:
            for tensor in (bank.base, *([] if bank.shared else bank.maps)):
                if isinstance(tensor, nn.Parameter):
                    # by these DeepSpeed knows what belongs to one expert-parallel rank
                    tensor.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
                    tensor.group_name = self.group_name  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def group(self) -> Any:
        """The ranks that hold one copy of all experts."""
        return groups._get_expert_parallel_group(self.group_name)

    def forward(
        self,
        x: Float[Tensor, "assignments width"],
        counts: Int[Tensor, " experts"],
        keys: Float[Tensor, "experts key_rank width"] | None = None,
    ) -> Float[Tensor, "assignments width"]:
        """Outputs before the shared map of rows sorted by expert, counts[i] rows for expert i."""
        ranks = dist.get_world_size(self.group)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        by_rank = torch.stack([counts.view(ranks, -1), arriving.view(ranks, -1)])
        sent, received = by_rank.sum(-1).tolist()
        rows = exchange(x, sent, received, self.group)
        # rows arrive sorted by sender, then by expert
        mine = torch.arange(len(arriving), device=x.device) % (len(arriving) // ranks)
        order = mine.repeat_interleave(arriving, output_size=len(rows)).argsort(stable=True)
        y = super().forward(rows[order], arriving.view(ranks, -1).sum(0), keys)
        y = torch.empty_like(y).index_copy(0, order, y)
        return exchange(y, received, sent, self.group)


class DeepSpeedExperts(ParallelExperts, DeepSpeedMoE):  # pyright: ignore[reportIncompatibleMethodOverride]
    """`ParallelExperts` that DeepSpeed takes for its own layer: only so does it average them right.

    Its engine refuses a model with such layers and no learned expert.
    """

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by the engine; the groups exist already."""
        if use_data_before_expert_parallel_:
            raise ValueError("use_data_before_expert_parallel: experts lie on consecutive ranks")


def make_groups(expert_parallel: int) -> str:
    """DeepSpeed's name of the groups of so many consecutive ranks; all ranks make them together."""
    name = f"ep_size_{expert_parallel}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert_parallel)
    return name


def parallel_experts(
    width: int, hidden: int, experts: int, *, expert_parallel: int, **options: Any
) -> ParallelExperts:
    """The class that fits: DeepSpeed's needs something learned in each expert."""
    maps: tuple[MapOptions, ...] = options["in_map"], options["out_map"]
    learned = any(one.train_base or not one.is_shared for one in maps)
    family = DeepSpeedExperts if learned else ParallelExperts
    return family(width, hidden, experts, expert_parallel=expert_parallel, **options)


def exchange(
    rows: Float[Tensor, "assignments width"], sent: list[int], received: list[int], group: Any
) -> Float[Tensor, "received width"]:
    """The first sent[0] rows go to rank 0 of the group, the next sent[1] to rank 1, and so on.

    Args:
        received: rows that come from each rank.
    """
    out = _Exchange.apply(rows, sent, received, group)
    assert isinstance(out, Tensor)
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.way_back = (received, sent, group)
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(gradients[0], *ctx.way_back), None, None, None
