"""Far from the origin the nearest code is found as near it; near it every bit is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simvq_moe.core.search import nearest as search
from simvq_moe.core.search.centring import best_centre
from simvq_moe.core.search.nearest import Codes, nearest, nearest_few

PLACES = ["both far", "codes far", "latents far", "most codes dead at the origin", "one latent"]


def data(place: str, offset: float, width: int = 16) -> tuple[Tensor, Tensor]:
    """Latents and codes with integer steps of 1/64, so that float32 holds them exactly."""
    g = torch.Generator().manual_seed(0)
    z, e = ((8 * torch.randn(n, width, generator=g)).round() / 8 for n in (300, 2000))
    z, e = (x + torch.randn(x.shape, generator=g).mul(64).round() / 8192 for x in (z, e))
    if place != "codes far":
        z = z + offset
    if place != "latents far":
        far = e + offset
        e = torch.cat([e[:1500], far[1500:]]) if place.startswith("most") else far
    return (z[:1] if place == "one latent" else z), e


def brute_force(z: Tensor, codes: Tensor) -> Tensor:
    return (z.double()[:, None] - codes.double()).square().sum(-1).argmin(1)


@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0, 1000.0])
@pytest.mark.parametrize("screened", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_ids_equal_float64_brute_force_at_any_offset(
    place: str, screened: bool, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "is_worth_screening", lambda *_: screened)
    z, e = data(place, offset)
    expected = brute_force(z, e)
    assert torch.equal(nearest(z, e), expected)
    assert torch.equal(nearest_few(z, e, 3)[0][:, 0], expected)


def test_a_map_that_carries_codes_far_away_is_searched_as_its_rows() -> None:
    torch.manual_seed(0)
    q, W, b = torch.randn(3, 700, 4), torch.randn(3, 4, 6), torch.randn(3, 1, 6) + 1000
    z, rows = torch.randn(50, 6) + 1000, (q @ W + b).flatten(0, 1)
    assert torch.equal(nearest(z, q.flatten(0, 1), W=W, bias=b[:, 0]), brute_force(z, rows))
    rows = q[0] @ W[0] + b[0]
    assert torch.equal(nearest(z, q[0], W=W[0], bias=b[0, 0]), brute_force(z, rows))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_near_the_origin_nothing_is_moved(offset: float) -> None:
    g = torch.Generator().manual_seed(0)
    z, e = torch.randn(500, 8, generator=g), torch.randn(900, 8, generator=g)
    assert best_centre(z + offset, Codes(e + offset, None, None, torch.float32)) is None


def test_ties_stay_ties_where_the_origin_is_moved() -> None:
    g = torch.Generator().manual_seed(0)
    book = torch.randint(-3, 4, (40, 4), generator=g).float() + 1000
    many, z = book.repeat(50, 1), book + 0.5
    assert torch.equal(nearest(z, many), brute_force(z, many))
