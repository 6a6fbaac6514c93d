"""Routers: which experts a token goes to, and with which weights.

A router scores tokens (`score`), chooses experts and forms gates. The plain one scores by
logits = x R^T, R the rows of a bank: plain rows, or Q W with one map shared by all experts, the
key-side counterpart of SimVQ's codebook (arXiv:2411.02038, eq. 4). `routers.build_router` makes
every kind.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from simvq_moe.core.bank import Bank, Transform
from simvq_moe.core.choices import check_choice
from simvq_moe.core.ids import as_ids
from simvq_moe.core.whitening import Whitening
from simvq_moe.moe.running_mean import RunningMean
from simvq_moe.moe.selection_bias import SelectionBias

Gates = Literal["softmax_topk", "topk_softmax", "sigmoid"]

NOBODY = -1
"""Expert id of a choice that is left open."""


def default_gates(router: str, experts: int, top_k: int) -> Gates:
    """The convention of a router's gates where none is asked for.

    One chosen expert of several has the constant gate 1 where gates sum to 1, and a constant gate
    teaches the router nothing: there it is the probability (Switch, arXiv:2101.03961, eq. 2).
    """
    alone = top_k == 1 and experts > 1 and router != "hash"
    return "softmax_topk" if alone else "topk_softmax"


class Routing(NamedTuple):
    """The choice of experts for each token."""

    ids: Tensor
    """int64 (tokens, choices): the chosen experts, best first; `NOBODY`: none."""
    gates: Tensor
    """float (tokens, choices): their weights in the sum of outputs."""
    logits: Tensor
    """float (tokens, experts): the scores that were compared, float32 at least."""
    losses: dict[str, Tensor]
    """The router's own losses by name, unweighted."""

    @property
    def counts(self) -> Int[Tensor, " experts"]:
        """int64: assignments of each expert in this batch, before any capacity."""
        return count(self.ids, self.logits.shape[-1])


class Router(nn.Module):
    """Top-k of what `score` gives; subclasses give `score`, or change `choose` and `own_losses`.

    Everything is computed in float32 at least, also under autocast.

    Args:
        experts: number of experts.
        top_k: experts of a token.
        gates: "softmax_topk": softmax over all experts, then the choice; "topk_softmax": softmax
            over the chosen, so that the gates sum to 1 (both in arXiv:1701.06538 and its heirs);
            "sigmoid": sigmoids of the chosen over their sum (DeepSeek-V3, arXiv:2412.19437,
            eq. 13 to 15).
    """

    leaves_open = False
    """Whether a choice may be `NOBODY`."""

    def __init__(self, experts: int, top_k: int, *, gates: Gates = "topk_softmax") -> None:
        super().__init__()
        check_choice("gates", gates, Gates)
        self.num_experts, self.top_k = experts, top_k
        self.gates: Gates = gates
        self.centre: RunningMean | Whitening | None = None
        """Of the layer's input; its mean is taken off what is scored, and a map of it `turn`s the
        rows that score."""
        self.selection: SelectionBias | None = None
        """Biases of the choice; None: the best logits are chosen."""
        self.starting = False
        """Whether the next input is there to `start` from."""
        self.keys: Bank | None = None
        """(experts, rank, width): keys that the experts compute with too, and whose map comes
        before both, see `enter`."""

    @property
    def gates_sum_to_one(self) -> bool:
        return self.gates != "softmax_topk"

    def forward(
        self,
        x: Float[Tensor, "tokens width"],
        token_ids: Int[Tensor, " tokens"] | None = None,
    ) -> Routing:
        """Route tokens.

        Args:
            x: tokens that have gone through `enter`.
            token_ids: their vocabulary ids, for routers that go by them.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            x = x - self._mean(x.dtype)
            logits = self.score(x, token_ids)
            ids, gates = self.choose(logits)
            return Routing(ids, gates, logits, self.own_losses(x, ids, logits))

    def enter(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """What router and experts see of tokens: x A^T under a shared map A of the keys."""
        flat = x.detach().reshape(-1, x.shape[-1])
        if self.starting:
            self.start(flat)
        if self.centre is not None:
            self.centre.collect(flat)
        return x if self.keys is None else self.keys.pull(x)

    def _mean(self, dtype: torch.dtype) -> Tensor | float:
        """The running mean as it comes out of `enter`."""
        if self.centre is None:
            return 0.0
        mean = self.centre.mean.to(dtype)
        return mean if self.keys is None else self.keys.pull(mean)

    def turn(self, rows: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """Rows under the whitening of the input, if there is one."""
        return self.centre.turn(rows) if isinstance(self.centre, Whitening) else rows

    def rows_of_products(self) -> Float[Tensor, "experts width"] | None:
        """The rows whose products with the input are the logits, up to biases; None: there are no
        such rows."""
        return None

    def start(self, x: Float[Tensor, "tokens width"]) -> None:
        """Set the map from the inputs of all ranks, where a router has one that can be."""

    def score(
        self, x: Float[Tensor, "tokens width"], token_ids: Int[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens experts"]:
        """Logits of every expert for every token."""
        raise NotImplementedError

    def choose(
        self, logits: Float[Tensor, "tokens experts"]
    ) -> tuple[Int[Tensor, "tokens choices"], Float[Tensor, "tokens choices"]]:
        """Ids and gates of the chosen experts, best first."""
        if self.selection is None:
            ids = logits.topk(self.top_k, dim=-1).indices
        else:
            scores = logits.sigmoid() if self.gates == "sigmoid" else logits.softmax(-1)
            ids = self.selection.choose(scores, self.top_k)
        return ids, self.gates_of(logits, ids)

    def gates_of(
        self, logits: Float[Tensor, "tokens experts"], ids: Int[Tensor, "tokens choices"]
    ) -> Float[Tensor, "tokens choices"]:
        """Gates of chosen experts by the router's convention."""
        if self.gates == "softmax_topk":
            return logits.softmax(-1).gather(-1, ids)
        chosen = logits.gather(-1, ids)
        if self.gates == "topk_softmax":
            return chosen.softmax(-1)
        scores = chosen.sigmoid()
        return scores / scores.sum(-1, keepdim=True)

    def reset(self, std: float) -> None:
        """Start again with rows of length std * sqrt(width)."""
        raise NotImplementedError

    def fold_(self) -> None:
        """Merge the map into the rows, in place."""

    def own_losses(
        self,
        x: Float[Tensor, "tokens width"],
        ids: Int[Tensor, "tokens choices"],
        logits: Float[Tensor, "tokens experts"],
    ) -> dict[str, Tensor]:
        """Losses that only this router has, by name, unweighted."""
        del x, ids, logits
        return {}


class TopKRouter(Router):
    """Logits x R^T (Shazeer et al., arXiv:1701.06538, without noise).

    Args:
        width: channels of a token.
        experts, top_k, gates: see `Router`.
        transform, base_width, train_base, bias, rank: of the bank of rows R = Q W; rows start from
            N(0, 1/base_width).
        expert_bias: add one learned number an expert to the logits, from 0.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        top_k: int,
        *,
        gates: Gates = "topk_softmax",
        transform: Transform = "none",
        base_width: int | None = None,
        train_base: bool = True,
        bias: bool = False,
        rank: int = 8,
        expert_bias: bool = False,
    ) -> None:
        super().__init__(experts, top_k, gates=gates)
        base_width = base_width or width
        self.bank = Bank(
            torch.randn(experts, base_width) / base_width**0.5,
            width=width,
            transform=transform,
            train_base=train_base,
            bias=bias,
            rank=rank,
        )
        self.bias = nn.Parameter(torch.zeros(experts)) if expert_bias else None

    def score(
        self, x: Float[Tensor, "tokens width"], token_ids: Int[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens experts"]:
        del token_ids
        if isinstance(self.centre, Whitening):
            scores = x @ self.turn(self.bank.rows(x.dtype)).T
        else:
            scores = self.bank.score(x)
        return scores if self.bias is None else scores + self.bias.to(x.dtype)

    def rows_of_products(self) -> Float[Tensor, "experts width"] | None:
        return self.turn(self.bank.rows())

    @torch.no_grad()
    def reset(self, std: float) -> None:
        # rows of the same length whatever the width of the base
        base_width = self.bank.base.shape[-1]
        self.bank.base.normal_(std=std * (self.bank.width / base_width) ** 0.5)
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def fold_(self) -> None:
        if isinstance(self.centre, Whitening):
            rows, bias = self.centre.fold(self.bank.rows())
            self.bank = Bank(rows, transform="none")
            self.bias = nn.Parameter(bias + (0 if self.bias is None else self.bias))
            self.centre = None
        else:
            self.bank = self.bank.fold()


class NoisyTopKRouter(TopKRouter):
    """Logits x R^T + N(0, 1) softplus(x N^T), the noise in training only (arXiv:1701.06538, eq. 4).

    N starts at 0, as in the paper's appendix A, which is noise of width ln 2.

    Args:
        width, experts, top_k, options: see `TopKRouter`; with expert_bias N has one as well.
    """

    def __init__(self, width: int, experts: int, top_k: int, **options: Any) -> None:
        super().__init__(width, experts, top_k, **options)
        self.noise = nn.Parameter(torch.zeros(experts, width))
        self.noise_bias = None if self.bias is None else nn.Parameter(torch.zeros(experts))

    def score(
        self, x: Float[Tensor, "tokens width"], token_ids: Int[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens experts"]:
        logits = super().score(x, token_ids)
        if not self.training:
            return logits
        widths = x @ self.turn(self.noise.to(x.dtype)).T
        if self.noise_bias is not None:
            widths = widths + self.noise_bias.to(x.dtype)
        return logits + torch.randn_like(logits) * F.softplus(widths)

    @torch.no_grad()
    def reset(self, std: float) -> None:
        super().reset(std)
        self.noise.zero_()
        if self.noise_bias is not None:
            self.noise_bias.zero_()

    @torch.no_grad()
    def fold_(self) -> None:
        if isinstance(self.centre, Whitening):
            rows, bias = self.centre.fold(self.noise)
            self.noise.copy_(rows)
            self.noise_bias = nn.Parameter(
                bias + (0 if self.noise_bias is None else self.noise_bias)
            )
        super().fold_()


def count(ids: Integer[Tensor, "*choices"], experts: int) -> Int[Tensor, " experts"]:
    """How often each expert was chosen; open choices count for nobody."""
    flat = as_ids(ids).reshape(-1)
    chosen = (flat >= 0).to(torch.int64)
    return torch.zeros(experts, dtype=torch.int64, device=ids.device).scatter_add_(
        0, flat.clamp_min(0), chosen
    )
