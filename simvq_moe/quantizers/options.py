"""What the options of our quantizers share: residual levels, and how codes are learned."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from simvq_moe.config.quantizer import QuantizerOptions
from simvq_moe.config.ranges import Share, Weight
from simvq_moe.core.gradient import Gradient
from simvq_moe.quantizers.base import AnyQuantizer
from simvq_moe.quantizers.composed import ResidualGradient, ResidualQuantizer


@dataclass(frozen=True)
class LevelOptions(QuantizerOptions):
    """Options of a kind that gives one level, of which several make a residual quantizer."""

    level_dropout: Share = 0.0
    """Probability that an item of a training batch goes through a random number of the first levels
    alone, so that fewer levels decode too; 0: none does."""

    @abstractmethod
    def level(self) -> AnyQuantizer:
        """A quantizer by itself."""

    def gradient_of_levels(self) -> ResidualGradient:
        """How the gradient of several levels' output reaches the latents."""
        return "straight_through"

    def build(self) -> AnyQuantizer:
        if self.residual_levels == 1:
            return self.level()
        levels = [self.level() for _ in range(self.residual_levels)]
        gradient = self.gradient_of_levels()
        return ResidualQuantizer(levels, gradient=gradient, dropout=self.level_dropout)

    def problems(self, at: str, config: Any) -> Iterator[str]:
        yield from super().problems(at, config)
        if self.level_dropout and self.residual_levels == 1:
            yield (
                f"{at}.level_dropout {self.level_dropout} with {at}.residual_levels 1: there is no "
                "level to leave out, use more levels or drop it"
            )


@dataclass(frozen=True)
class LearnedOptions(LevelOptions):
    """Options of codes that are learned, by a gradient or as averages."""

    gradient: Gradient = "straight_through"
    """How the decoder's gradient reaches the encoder; with noise_substitution (NSVQ of 2022) the
    decoder also trains on noise as long as the error, and weights of 0 leave all to its loss."""
    commitment_weight: Weight = 0.25
    """Weight of |z - sg e|^2."""

    def gradient_of_levels(self) -> ResidualGradient:
        assert self.gradient in ("straight_through", "rotation")
        return self.gradient

    def problems(self, at: str, config: Any) -> Iterator[str]:
        yield from super().problems(at, config)
        if self.residual_levels > 1 and self.gradient in ("diveq", "noise_substitution"):
            yield (
                f"{at}.gradient {self.gradient!r} knows no {at}.residual_levels "
                f"{self.residual_levels}: use 'straight_through' or 'rotation'"
            )


@dataclass(frozen=True)
class CodebookOptions(LearnedOptions):
    """Options of codes that are learned by a gradient."""

    codebook_weight: Weight = 1.0
    """Weight of |e - sg z|^2."""

    def weights(self) -> dict[str, Any]:
        """How the class is told what all codebooks have."""
        return {
            "gradient": self.gradient,
            "codebook_weight": self.codebook_weight,
            "commitment_weight": self.commitment_weight,
        }


def restart_problems(at: str, restart: float) -> Iterator[str]:
    """A threshold below which a code restarts, which can't be as much as it restarts with."""
    if not restart < 1:
        yield (
            f"{at}.restart {restart} is not below 1, the draws a step that a restarted code is "
            "given: use less, such as 0.1"
        )


def level_problems(at: str, options: QuantizerOptions) -> Iterator[str]:
    """Residual levels of codes that are all of one length."""
    if options.residual_levels > 1:
        yield (
            f"{at}.residual_levels {options.residual_levels} with {at}.kind {options.kind!r}, "
            "whose codes are all of length 1 and refine nothing: use 1 level, or another kind"
        )


def bit_problems(at: str, options: QuantizerOptions) -> Iterator[str]:
    """A number of codes that is not that of the channels' signs."""
    if options.codes != 2**options.width:
        yield (
            f"{at}.codes {options.codes} must be 2^{at}.width = {2**options.width} with {at}.kind "
            f"{options.kind!r}: a channel is a bit"
        )
