"""Kinds of whitening of a router's input, see `core.whitening`.

Rows meet the map once a forward pass (experts x width^2 multiply-adds for the whole covariance,
2 experts x width x rank for a few directions), and every so many steps moments are counted, which
ranks add up: width^2, width, or width x rank numbers in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from simvq_moe.config.moe import MoEConfig, WhiteningOptions
from simvq_moe.config.ranges import Channels, Count, Decay, Range
from simvq_moe.config.registry import register
from simvq_moe.core.whitening import (
    DiagonalWhitening,
    FullWhitening,
    LowRankWhitening,
    Whitening,
)


@register
@dataclass(frozen=True)
class NoWhitening(WhiteningOptions):
    """The router sees what comes in."""

    kind: Literal["none"] = "none"

    def build(self, width: int) -> None:
        del width


@dataclass(frozen=True)
class RunningWhitening(WhiteningOptions):
    """What all kinds share that whiten."""

    exponent: Annotated[float, Range(-2, 2)] = 1.0
    """p of C^(-p/2): 1 whitens, 0 centres alone, -1 is the opposite map."""
    decay: Decay = 0.99
    """Weight of the past in the running moments, a step."""
    floor: Annotated[float, Range(1e-9, 1)] = 0.01
    """Least eigenvalue that counts, as a share of the mean one."""
    every: Count = 10
    """Steps between two updates of moments and map, after as many first steps with one each."""

    def options(self) -> dict[str, Any]:
        """Arguments of `Whitening`."""
        return {name: getattr(self, name) for name in ("exponent", "decay", "floor", "every")}


@register
@dataclass(frozen=True)
class FullCovariance(RunningWhitening):
    """Whitening by the whole covariance."""

    kind: Literal["full"] = "full"

    def build(self, width: int) -> Whitening:
        return FullWhitening(width, **self.options())


@register
@dataclass(frozen=True)
class ChannelVariances(RunningWhitening):
    """Whitening by the variance of each channel alone: a control, which knows no directions."""

    kind: Literal["diagonal"] = "diagonal"

    def build(self, width: int) -> Whitening:
        return DiagonalWhitening(width, **self.options())


@register
@dataclass(frozen=True)
class LargestDirections(RunningWhitening):
    """Whitening by the largest principal directions, and one variance for all others."""

    kind: Literal["low_rank"] = "low_rank"
    rank: Channels = 32
    """Number of principal directions."""

    def misfits(self, at: str, layer: MoEConfig, width: int) -> Iterator[str]:
        del layer
        if not self.rank < width:
            yield (
                f"{at}.rank {self.rank} >= width {width} of the model: lower it, or use {at}.kind "
                "'full'"
            )

    def build(self, width: int) -> Whitening:
        return LowRankWhitening(width, rank=self.rank, **self.options())
