"""Where the origin should lie, so that distances can be told from products in float32.

|z - e|^2 = |z|^2 - 2 z · e + |e|^2 loses as many bits as |z| and |e| have more than z - e. Moving
the origin by c costs nothing, for distances stay, and z - c is exact where z and c are close
(Sterbenz, Floating-point computation, 1974). The best c lies among the codes that win: the centre
of the codes where these are a cloud far from the origin, or that of the latents where some codes
are near them and others are not, as dead codes are that stayed at the origin.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SAMPLE = 256
"""Rows that tell where a cloud lies."""

FAR = 2.0
"""Distance from the origin over the spread, from which a cloud is far: below it at most
log2(1 + FAR^2) bits of 24 are lost, and nothing is moved."""


@runtime_checkable
class Searched(Protocol):
    """Codes that come in tiles, and of which some can be looked at."""

    tile: int

    def sample(self) -> Float[Tensor, "rows width"]: ...
    def tiles(self, size: int) -> Iterator[tuple[int, Float[Tensor, "rows width"]]]: ...


def best_centre(
    z: Float[Tensor, "tokens width"], codes: Searched
) -> Float[Tensor, " width"] | None:
    """The point to be taken off latents and codes before they are compared; None: the origin."""
    if not len(z):
        return None
    of_codes, codes_are_far = _cloud(codes.sample())
    of_latents, latents_are_far = _cloud(spread_sample(z))
    codes_far, latents_far = torch.stack([codes_are_far, latents_are_far]).tolist()
    if codes_far:
        return of_codes
    if not latents_far:
        return None
    nearest = torch.stack(
        [(rows - of_latents).square().sum(1).amin() for _, rows in codes.tiles(codes.tile)]
    ).amin()
    return of_latents if bool(FAR**2 * nearest < of_latents.square().sum()) else None


def far_centre(rows: Float[Tensor, "rows width"]) -> Float[Tensor, " width"]:
    """The centre of rows that are far from the origin, 0 of others."""
    centre, far = _cloud(rows)
    return torch.where(far, centre, torch.zeros_like(centre))


def spread_sample(
    rows: Float[Tensor, "rows ..."], number: int = SAMPLE
) -> Float[Tensor, "some ..."]:
    """About so many of the rows, evenly spread; all where they are few."""
    return rows[:: max(1, len(rows) // max(1, number))]


def _cloud(rows: Tensor) -> tuple[Float[Tensor, " width"], Bool[Tensor, ""]]:
    """Centre of rows, and whether it is far from the origin for their spread.

    Medians, so that a few rows elsewhere do not matter, and so that data on a grid stay on it:
    ties stay ties. What is not finite is not far.
    """
    centre = rows.median(0).values
    spread = (rows - centre).square().sum(1).median()
    return centre, centre.square().sum() > FAR**2 * spread
