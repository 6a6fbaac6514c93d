"""The family of quantizers, as a config has it; each kind is a file of
simvq_moe/quantizers/kinds."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from simvq_moe.config.ranges import COUNT, Channels, Range
from simvq_moe.config.registry import Options, family

Own = TypeVar("Own", bound="QuantizerOptions")


@family(package="simvq_moe.quantizers.kinds", default="simvq")
@dataclass(frozen=True)
class QuantizerOptions(Options):
    """The codebook between encoder and decoder."""

    kind: str = ""
    """simvq: frozen rows under one shared map; the others are baselines."""
    codes: Annotated[int, Range(2, COUNT)] = 512
    """Number of codes."""
    width: Channels = 32
    """Channels of a code."""
    residual_levels: Annotated[int, Range(1, 256)] = 1
    """Quantizers in a row, each for what the ones before it left over."""

    @abstractmethod
    def build(self) -> Any:
        """The quantizer, or as many of them in a row as it has residual levels."""

    @classmethod
    def example(cls: type[Own]) -> Own:
        """Options that can run, of a kind whose defaults can't: for tables of costs, and tests."""
        return cls()

    def folded(self) -> QuantizerOptions | None:
        """Options of a quantizer without a shared map that has the same codes as this one when it
        is folded; None: this kind has no map to fold."""
        return None
