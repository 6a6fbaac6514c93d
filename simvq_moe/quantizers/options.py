"""What the options of our quantizers share: residual levels, and how codes are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from simvq_moe.config.quantizer import QuantizerOptions
from simvq_moe.config.ranges import Share, Weight
from simvq_moe.core.gradient import Gradient
from simvq_moe.quantizers.base import AnyQuantizer
from simvq_moe.quantizers.composed import ResidualGradient, ResidualQuantizer
from simvq_moe.quantizers.parts.restart import restart_problems


@dataclass(frozen=True)
class LevelOptions(QuantizerOptions):
    """Options of a kind that gives one level, of which several make a residual quantizer."""

    level_dropout: Share = 0.0
    """Probability that an item of a training batch goes through a random number of the first levels
    alone, so that fewer levels decode too; 0: none does."""

    quantizer: ClassVar[Callable[..., AnyQuantizer]]
    """The class of a level; its arguments have the names of the fields."""

    def level(self) -> AnyQuantizer:
        """A quantizer by itself."""
        return self.quantizer(**self.arguments())

    def arguments(self) -> dict[str, Any]:
        """What the class is told: all fields but those of several levels, and no "default"."""
        ours = ("kind", "residual_levels", "level_dropout")
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ours}
        return {name: value for name, value in given.items() if value != "default"}

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
class RestartingOptions(LearnedOptions):
    """Options of free rows, which can start from data and start again."""

    init: Literal["default", "kmeans"] = "default"
    """kmeans: the codes start from the centres of the first batch."""
    restart: Share = 0.0
    """A code drawn less often a step than this, on average, restarts at a latent of the batch; less
    than 1, and 0: never."""

    def problems(self, at: str, config: Any) -> Iterator[str]:
        yield from super().problems(at, config)
        yield from restart_problems(self.restart, f"{at}.")


@dataclass(frozen=True)
class CodebookOptions(LearnedOptions):
    """Options of codes that are learned by a gradient."""

    codebook_weight: Weight = 1.0
    """Weight of |e - sg z|^2."""


def shared_fields(options: QuantizerOptions, base: type[QuantizerOptions]) -> dict[str, Any]:
    """What options say in the fields of a base of theirs, but for their kind."""
    return {f.name: getattr(options, f.name) for f in fields(base) if f.name != "kind"}


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
