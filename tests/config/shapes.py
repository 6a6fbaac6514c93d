"""A family of components with another one inside, for tests of how configs are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from simvq_moe.config.ranges import Count, Range, Share
from simvq_moe.config.registry import Options, default_of, family, register


@family(package="tests.config.shapes", default="plain")
@dataclass(frozen=True)
class PaintOptions(Options):
    """How a shape is painted."""

    kind: str = "plain"
    """How a shape is painted."""
    layers: Count = 1
    """Coats."""


@register
@dataclass(frozen=True)
class Plain(PaintOptions):
    """One colour."""

    kind: Literal["plain"] = "plain"


@register
@dataclass(frozen=True)
class Striped(PaintOptions):
    """Two colours in turn."""

    kind: Literal["striped"] = "striped"
    stripes: Annotated[int, Range(2, 99)] | None = None
    """Number of stripes; None: as many as fit."""


@family(package="tests.config.shapes", default="circle")
@dataclass(frozen=True)
class ShapeOptions(Options):
    """What is drawn."""

    kind: str = "circle"
    """What is drawn."""
    size: Count = 10
    """Pixels."""
    paint: PaintOptions = field(default_factory=lambda: default_of(PaintOptions))


@register
@dataclass(frozen=True)
class Circle(ShapeOptions):
    """A circle."""

    kind: Literal["circle"] = "circle"
    style: Literal["filled", "ring"] = "filled"
    """Whether it has a hole."""
    gap: Share = 0.0
    """Share of the line that is missing."""


@register
@dataclass(frozen=True)
class Polygon(ShapeOptions):
    """Straight lines."""

    kind: Literal["polygon"] = "polygon"
    size: Count = 20
    """Pixels."""
    corners: Annotated[int, Range(3, 12)] = 3
    """Number of corners."""
    style: Literal["filled", "rounded"] = "filled"
    """Whether its corners are round."""
    gap: Share = 0.5
    """Share of the line that is missing."""

    def problems(self, at: str, config: Any) -> Iterator[str]:
        del config
        if self.corners > self.size:
            yield f"{at}.corners {self.corners} > {at}.size {self.size}: use fewer"


@register
@dataclass(frozen=True)
class Star(ShapeOptions):
    """Straight lines to the middle and back."""

    kind: Literal["star"] = "star"
    corners: Annotated[int, Range(3, 12)] = 5
    """Number of points."""


@dataclass(frozen=True)
class Drawing:
    """A whole config."""

    title: str
    """Must be given."""
    shape: ShapeOptions = field(default_factory=lambda: default_of(ShapeOptions))
    frame: ShapeOptions = field(default_factory=lambda: Polygon(corners=4))
