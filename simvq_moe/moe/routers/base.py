"""Routers: which experts a token goes to, and with which weights.

A router scores tokens (`score`), chooses experts and forms gates. Each kind is one file of this
folder: its class, and its options, which name it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from simvq_moe.config.moe import Gates, MoEConfig, RouterOptions
from simvq_moe.core.bank import Bank
from simvq_moe.core.ids import as_ids
from simvq_moe.core.running_mean import RunningMean
from simvq_moe.core.whitening import Whitening
from simvq_moe.moe.balances.base import SelectionBias
from simvq_moe.moe.products import Product


@dataclass(frozen=True)
class ScoringOptions(RouterOptions):
    """Options of routers that see a token's channels."""

    centre: bool = False
    """Take a running mean over tokens off the router's input; momentum 0.99 a step."""

    router: ClassVar[Callable[[int, MoEConfig], Router]]
    """The class of the router: of the channels of a token, and the layer that has these options."""

    def build(self, width: int, layer: MoEConfig, vocabulary: int | None) -> Router:
        del vocabulary
        router = self.router(width, layer)
        router.centre = self.centring(width)
        return router

    def centring(self, width: int) -> RunningMean | Whitening | None:
        """What follows the input's mean."""
        return RunningMean(width) if self.centre else None


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


class Router(nn.Module, ABC):
    """Top-k of what `score` gives; subclasses give `score`, or change `choose` and `own_losses`.

    Everything is computed in float32 at least, also under autocast. Gates follow the layer's
    convention. "softmax_topk": softmax over all experts, then the choice; "topk_softmax": softmax
    over the chosen, so that the gates sum to 1 (both in arXiv:1701.06538 and its heirs); "sigmoid":
    sigmoids of the chosen over their sum (DeepSeek-V3, arXiv:2412.19437, eq. 13 to 15).

    Args:
        layer: options of the layer, of which the router has its sizes, its gates and its own.
    """

    options: Any
    """The router's own options, as it was built; a subclass names their type."""

    leaves_open = False
    """Whether a choice may be `NOBODY`."""

    def __init__(self, layer: MoEConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = layer.experts, layer.top_k
        self.gates: Gates = layer.convention
        self.options = layer.router
        self.centre: RunningMean | Whitening | None = None
        """What follows the layer's input; its mean is taken off what is scored, and a map of it
        `turn`s the rows that score."""
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

    @abstractmethod
    def score(
        self, x: Float[Tensor, "tokens width"], token_ids: Int[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens experts"]:
        """Logits of every expert for every token."""

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

    def linear_readers(self) -> list[Bank | Tensor]:
        """The banks and weights through which alone the input is read, each row in a product.

        Raises:
            ValueError: it is read in another way.
        """
        raise ValueError(
            f"{type(self).__name__} has no rows that a gain on its input can be merged into"
        )

    def products(self, batch_tokens: int) -> Iterator[Product]:
        """Its matrix products for a token, where so many tokens share one forward pass."""
        if isinstance(self.centre, Whitening):  # moments of the steps that count
            vectors = (1 + 1 / batch_tokens) / self.centre.every
            yield Product(self.centre.multiply_adds * vectors, backward=False)

    def products_of_turn(self, batch_tokens: int, *, learned: bool = True) -> Iterator[Product]:
        """Rows under the whitening, once a forward pass."""
        if isinstance(self.centre, Whitening):
            turned = self.num_experts * self.centre.multiply_adds / batch_tokens
            yield Product(turned, learned=False, backward=learned)

    @abstractmethod
    def reset(self, std: float) -> None:
        """Start again with rows of length std * sqrt(width)."""

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


@torch.no_grad()
def start_from_data(model: nn.Module, batch: Tensor) -> None:
    """Call `start` of every router with what it sees of a batch; all ranks call it together.

    One forward pass in evaluation, in which a layer has started when the next one sees its output.

    Args:
        model: `model(batch)` runs every layer.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    was_training = model.training
    for router in routers:
        router.starting = True
    model.eval()(batch)
    for router in routers:
        router.starting = False
    model.train(was_training)


def count(ids: Integer[Tensor, "*choices"], experts: int) -> Int[Tensor, " experts"]:
    """How often each expert was chosen; open choices count for nobody."""
    flat = as_ids(ids).reshape(-1)
    chosen = (flat >= 0).to(torch.int64)
    return torch.zeros(experts, dtype=torch.int64, device=ids.device).scatter_add_(
        0, flat.clamp_min(0), chosen
    )
