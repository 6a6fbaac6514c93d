"""One mixture-of-experts layer: its options, and the families that its parts are chosen from.

The kinds of a family stand in simvq_moe/moe/, each in the file of what it builds, and so do the
methods of a part that compute: here are the options that all kinds share, and what a layer asks of
them. The same rules check a config and the arguments of a layer that is built in Python, so keys
are given as `at`: "moe.router" there and "router" here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from simvq_moe.config.ranges import Channels, Range, Weight
from simvq_moe.config.registry import Options, default_of, family

Gates = Literal["softmax_topk", "topk_softmax", "sigmoid"]
Dispatch = Literal["sorted", "deepspeed_capacity"]


@dataclass(frozen=True)
class PartOptions(Options):
    """Options of a part of a layer."""

    def misfits(self, at: str, layer: MoEConfig, width: int) -> Iterator[str]:
        """What keeps this part from running in a layer: key, value and way out, a line each.

        Args:
            at: key of these options.
            layer: all options of the layer, with its gates spelled out.
            width: channels of a token.
        """
        del at, layer, width
        return iter(())


@family(package="simvq_moe.moe.maps", default="none")
@dataclass(frozen=True)
class MapOptions(PartOptions):
    """A learned map of the rows of a bank, rows = base W, that starts as the identity."""

    train_base: bool = True
    """Learn the base rows beside the map; False without a map: rows that stay as they started."""

    @property
    def is_shared(self) -> bool:
        """Whether one map, or none, serves all rows."""
        return True

    @property
    def starts_from_data(self) -> bool:
        """Whether moments of data can set the map."""
        return False

    @property
    def learns(self) -> bool:
        """Whether anything of the rows learns."""
        return True

    def base_channels(self, width: int) -> int:
        """Channels of a base row under rows of this width."""
        return width

    @abstractmethod
    def bank(self, base: Any, *, width: int | None = None, bias: bool = False) -> Any:
        """The `core.bank.Bank` of these base rows under this map."""


@family(package="simvq_moe.moe.whitening", default="none")
@dataclass(frozen=True)
class WhiteningOptions(PartOptions):
    """Whether a router sees (x - m) C^(-p/2), with the running mean and covariance of its input.

    All rows share this map, which is set by the data and not by a gradient.
    """

    @abstractmethod
    def build(self, width: int) -> Any:
        """The `core.whitening.Whitening`, or None."""


@family(package="simvq_moe.moe.expert_kinds", default="gelu")
@dataclass(frozen=True)
class ExpertOptions(PartOptions):
    """The network that each expert is."""

    @property
    @abstractmethod
    def is_gated(self) -> bool:
        """Whether its first projection has a second half, the gate, above the first."""

    @property
    @abstractmethod
    def kept_numbers(self) -> int:
        """Numbers kept for the backward pass between the projections, for each hidden channel."""

    @abstractmethod
    def activate(self, x: Any) -> Any:
        """The hidden channels, of what comes out of the first projection."""


@family(package="simvq_moe.moe.balances", default="none")
@dataclass(frozen=True)
class BalanceOptions(PartOptions):
    """What evens out the use of experts."""

    @property
    def loss_weight(self) -> float:
        """Weight of `loss` in the loss of a model, which measures it in any case."""
        return 0.0

    @property
    def has_biases(self) -> bool:
        """Whether it decides the choice by biases."""
        return False

    @abstractmethod
    def loss(self, logits: Any, counts: Any) -> Any:
        """A loss of one layer from its logits and the assignments of each expert."""

    @abstractmethod
    def biases(self, experts: int, top_k: int) -> Any:
        """Biases of the choice, a `moe.balances.base.SelectionBias`, or None."""


@family(package="simvq_moe.moe.routers", default="topk")
@dataclass(frozen=True)
class RouterOptions(PartOptions):
    """How a token's experts are chosen."""

    @property
    def conventions(self) -> tuple[Gates, ...]:
        """Gates that it can form."""
        return ("topk_softmax", "softmax_topk", "sigmoid")

    @property
    def why_conventions(self) -> str:
        """What its gates are, where it can't form all."""
        return ""

    @property
    def has_scores(self) -> bool:
        """Whether it has logits of tokens, which losses can change."""
        return True

    @property
    def takes_biases(self) -> bool:
        """Whether biases on its scores change the choice."""
        return True

    @property
    def takes_capacity(self) -> bool:
        """Whether experts may get more than their share, so that a capacity means something."""
        return True

    @property
    def learns_by_gates(self) -> bool:
        """Whether gates are the only way in which the layer's output teaches it."""
        return False

    @property
    def starts_from_data(self) -> bool:
        """Whether it waits for `start_from_data`."""
        return False

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Weights of its own losses in the loss of a model."""
        return {}

    def default_gates(self, experts: int, top_k: int) -> Gates:
        """The convention where none is asked for.

        One chosen expert of several has the constant gate 1 where gates sum to 1, and a constant
        gate teaches a router nothing: there it is the probability (Switch, arXiv:2101.03961,
        eq. 2).
        """
        wanted = "softmax_topk" if experts > top_k == 1 else "topk_softmax"
        return wanted if wanted in self.conventions else self.conventions[0]

    def folded(self) -> RouterOptions:
        """The options of the router whose maps are merged into its rows."""
        return replace(self, **self.changes_of_folding())

    def changes_of_folding(self) -> dict[str, Any]:
        """The fields that are others once maps are merged into rows."""
        return {}

    @abstractmethod
    def build(self, width: int, layer: MoEConfig, vocabulary: int | None) -> Any:
        """The `moe.routers.base.Router` of a layer.

        Args:
            width: channels of a token.
            layer: options of the layer, with its gates spelled out.
            vocabulary: number of vocabulary ids, for routers that go by them.
        """

    def misfits(self, at: str, layer: MoEConfig, width: int) -> Iterator[str]:
        del width
        gates, balance, capacity, z = (
            beside(at, key) for key in ("gates", "balance", "capacity_factor", "z_loss_weight")
        )
        mine = f"{at}.kind {self.kind!r}"
        if layer.gates != "default" and layer.gates not in self.conventions:
            yield (
                f"{gates} {layer.gates!r} with {mine}: {self.why_conventions}: set "
                f"{self.conventions[0]!r}"
            )
        unbiased = layer.balance.has_biases and not self.takes_biases
        if unbiased or (not self.has_scores and layer.balance.loss_weight):
            has = "scores" if layer.balance.loss_weight else "choice by biased scores"
            yield (
                f"{balance}.kind {layer.balance.kind!r} means nothing to {mine}, which has no "
                f"{has}: use 'none', or another router"
            )
        if not self.has_scores and layer.z_loss_weight:
            yield (
                f"{z} {layer.z_loss_weight} means nothing to {mine}, which has no scores: drop "
                "it, or use another router"
            )
        if not self.takes_capacity and layer.capacity_factor:
            yield (
                f"{capacity} {layer.capacity_factor} means nothing to {mine}, whose loads are even "
                "already: drop it, or use another router"
            )


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts layers."""

    experts: Channels = 64
    """Experts of a layer."""
    top_k: Channels = 4
    """Experts of a token."""
    hidden: Channels = 16
    """Hidden channels of an expert."""
    expert: ExpertOptions = field(default_factory=lambda: default_of(ExpertOptions))
    """The network that each expert is."""
    shared_experts: Annotated[int, Range(0, 2**10)] = 0
    """Experts of the same size that every token goes through beside its choice."""
    capacity_factor: Weight = 0.0
    """Assignments that an expert takes over its fair share of a rank's batch; 0: dropless."""
    router: RouterOptions = field(default_factory=lambda: default_of(RouterOptions))
    """How a token's experts are chosen."""
    gates: Literal["default", "softmax_topk", "topk_softmax", "sigmoid"] = "default"
    """Softmax over all experts before the choice, softmax over the chosen, or normalized sigmoids
    of the chosen; the gates of the last two sum to 1. default: topk_softmax, but softmax_topk where
    a token has one expert of several, whose gate would be the constant 1."""
    balance: BalanceOptions = field(default_factory=lambda: default_of(BalanceOptions))
    """What evens out the use of experts."""
    z_loss_weight: Weight = 0.0
    """Weight of the mean squared logsumexp of the logits (arXiv:2202.08906)."""
    expert_in_map: MapOptions = field(default_factory=lambda: default_of(MapOptions))
    """Map A before the experts: E_i(x A)."""
    expert_out_map: MapOptions = field(default_factory=lambda: default_of(MapOptions))
    """Map W after the gated sum of experts: y = (sum g_i E_i(x)) W."""
    expert_out_bias: bool = False
    """One learned vector added to the sum."""
    expert_bias: bool = False
    """One learned vector added to each expert's outputs, as folding makes of expert_out_bias."""
    dispatch: Dispatch = "sorted"
    """Ours, without padding, or DeepSpeed's own layer as a baseline: padded to the capacity, or
    without one to the fullest expert."""
    expert_parallel: Channels = 1
    """Ranks that share the experts of a layer, which are exchanged by all-to-all; 1: every rank
    has all of them."""

    @property
    def convention(self) -> Gates:
        """The gates, spelled out."""
        if self.gates == "default":
            return self.router.default_gates(self.experts, self.top_k)
        return self.gates

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss of the layers in the loss of a model, by the loss's name."""
        own = {"balance": self.balance.loss_weight, "z": self.z_loss_weight}
        return own | dict(self.router.loss_weights)

    @property
    def gate_teaches_nothing(self) -> bool:
        """Whether the one gate of a token is the constant 1, and the router learns by gates."""
        alone = self.experts > self.top_k == 1 and self.convention != "softmax_topk"
        return alone and self.router.learns_by_gates

    def folded(self) -> MoEConfig:
        """The options of the layer whose maps are merged into the rows that they map."""
        plain = default_of(MapOptions)
        return replace(
            self,
            router=self.router.folded(),
            expert_in_map=plain,
            expert_out_map=plain,
            expert_out_bias=False,
            expert_bias=self.expert_bias or self.expert_out_bias,
        )

    def misfits(self, width: int, prefix: str = "") -> Iterator[str]:
        """What keeps such a layer from running: key, value and way out, a line each.

        Args:
            width: channels of a token.
            prefix: of every key, such as "moe.".
        """
        if self.top_k > self.experts:
            yield (
                f"{prefix}top_k {self.top_k} > {prefix}experts {self.experts}: "
                f"lower {prefix}top_k or raise {prefix}experts"
            )
        if self.expert_bias and (self.expert_out_bias or self.expert_out_map.kind != "none"):
            yield (
                f"{prefix}expert_bias True with a map or a bias after the experts, into which it "
                f"can't be folded: use {prefix}expert_out_bias alone"
            )
        for at, part in parts(self, prefix):
            yield from part.misfits(at, self, width)
        for name in ("expert_in_map", "expert_out_map"):
            found = getattr(self, name)
            if found.base_channels(width) != width:
                yield (
                    f"{prefix}{name}.base_width {found.base_channels(width)}: projections of "
                    "experts have the width of the model: drop it"
                )


def parts(options: Any, prefix: str = "") -> Iterator[tuple[str, PartOptions]]:
    """Every part of a layer by its key, also those within others."""
    for f in fields(options):
        value = getattr(options, f.name)
        if isinstance(value, PartOptions):
            yield prefix + f.name, value
            yield from parts(value, f"{prefix}{f.name}.")


def beside(at: str, key: str) -> str:
    """The key beside another: moe.gates beside moe.router."""
    above, dot, _ = at.rpartition(".")
    return f"{above}{dot}{key}"
