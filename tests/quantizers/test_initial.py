"""Starts from data: SimVQ's moments keep codes alive, k-means finds clusters, checkpoints know."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from simvq_moe import EMAVQ, VQ, SimVQ
from simvq_moe.quantizers import CosineVQ, GroupVQ

WIDTH, CODES = 32, 1024
SETS = ["centred", "shifted", "low rank", "low rank shifted"]


def latents(name: str, tokens: int = 16384) -> Tensor:
    torch.manual_seed(0)
    map_ = torch.randn(4, WIDTH) / 2 if "low rank" in name else torch.eye(WIDTH)
    return torch.randn(tokens, len(map_)) @ map_ + (5 if "shifted" in name else 0)


def used_after_training(quantizer: SimVQ, z: Tensor, steps: int) -> float:
    """Share of codes that the whole set draws after `steps` of codebook-only training."""
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-2)
    quantizer.initialize(z[:4096])
    for _ in range(steps):
        batch = z[torch.randint(len(z), (1024,))]
        optimizer.zero_grad()
        quantizer(batch).losses["codebook"].backward()
        optimizer.step()
    return len(quantizer.encode(latents_like(z)).unique()) / quantizer.codes


def latents_like(z: Tensor) -> Tensor:
    """Sixteen draws a code from the same distribution: with fewer, chance alone leaves some out."""
    centred = z - z.mean(0)
    factor = torch.linalg.svd(centred / len(z) ** 0.5, full_matrices=False)
    return torch.randn(16 * CODES, WIDTH) * factor.S @ factor.Vh + z.mean(0)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("init", ["identity", "data"])
def test_data_start_keeps_codes_used_where_the_published_start_collapses(
    init: Literal["identity", "data"], name: str
) -> None:
    """With -s it prints the numbers."""
    z = latents(name)
    share = used_after_training(SimVQ(CODES, WIDTH, init=init), z, steps=300)
    print(f"\n{init} start, {name}: {round(share * CODES)} of {CODES} codes used")
    if init == "identity" and "shifted" in name:
        assert share < 0.01
    else:
        assert share > 0.98


@pytest.mark.parametrize(
    ("transform", "base_width"), [("linear", 6), ("linear", 9), ("linear", 4), ("diagonal", 6)]
)
def test_codes_start_with_the_moments_of_the_latents(transform: str, base_width: int) -> None:
    torch.manual_seed(0)
    quantizer = SimVQ(
        200_000,
        6,
        transform="linear" if transform == "linear" else "diagonal",
        base_width=base_width,
        init="data",
    ).double()
    z = torch.randn(500, 6).double() @ torch.randn(6, 6).double() + 3
    quantizer.initialize(z)
    codes, covariance = quantizer.codebook().detach(), torch.cov(z.T, correction=0)
    if transform == "diagonal":
        expected = torch.diag(covariance.diagonal())
    elif base_width < 6:
        values, vectors = torch.linalg.eigh(covariance)
        largest = vectors[:, -base_width:]
        expected = largest @ torch.diag(values[-base_width:]) @ largest.T
    else:
        expected = covariance
    # the base is a finite sample of N(0, 1/base_width): 200,000 rows give moments to about 1 %
    assert_close(codes.mean(0), z.mean(0), rtol=0.02, atol=0.02)
    assert_close(torch.cov(codes.T), expected, rtol=0.02, atol=0.05)


def test_groups_start_from_data_with_the_codes_of_simvq_and_then_part() -> None:
    torch.manual_seed(0)
    grouped = GroupVQ(12, 3, groups=3, init="data")
    torch.manual_seed(0)
    single = SimVQ(12, 3, init="data")
    z = torch.randn(50, 3) @ torch.randn(3, 3) + 4
    for quantizer in (grouped, single):
        quantizer.initialize(z)
        assert not quantizer.waits_for_data
    assert_close(grouped.codebook(), single.codebook())
    assert_close(grouped(z).loss, single(z).loss)
    grouped(z).loss.backward()
    assert grouped.bank.W is not None
    assert grouped.bank.W.grad is not None
    first, second, third = grouped.bank.W.grad
    assert float((first - second).norm()) > 0.1 * float(first.norm())
    assert float((first - third).norm()) > 0.1 * float(first.norm())


def test_the_first_training_pass_starts_from_data_by_itself_and_once() -> None:
    torch.manual_seed(0)
    quantizer = SimVQ(8, 3, init="data")
    quantizer.eval()(torch.randn(20, 3) + 5)
    assert quantizer.waits_for_data
    quantizer.train()(torch.zeros(0, 3))
    assert quantizer.waits_for_data
    quantizer(torch.randn(20, 3) + 5)
    assert not quantizer.waits_for_data
    before = quantizer.codebook().detach().clone()
    quantizer(torch.randn(20, 3) - 5)
    quantizer.initialize(torch.randn(20, 3) - 5)
    assert torch.equal(quantizer.codebook(), before)
    restored = SimVQ(8, 3, init="data")
    restored.load_state_dict(quantizer.state_dict())
    assert not restored.waits_for_data


def test_what_another_rank_has_started_is_not_started_again() -> None:
    torch.manual_seed(0)
    started, other = (VQ(8, 3, init="kmeans") for _ in range(2))
    started.initialize(torch.randn(40, 3))
    with torch.no_grad():  # as DistributedDataParallel does with what rank 0 has loaded
        for name, tensor in other.state_dict().items():
            tensor.copy_(started.state_dict()[name])
    other.train()(torch.randn(40, 3) + 9)
    assert not other.waits_for_data
    assert torch.equal(other.codebook(), started.codebook())


def test_masked_latents_do_not_enter_the_start() -> None:
    torch.manual_seed(0)
    z, mask = torch.randn(30, 3), torch.arange(30) < 20
    z[20:] = 1e3
    quantizer = SimVQ(8, 3, init="data")
    quantizer.initialize(z, mask)
    assert quantizer.bank.bias is not None
    assert_close(quantizer.bank.bias.detach(), z[:20].mean(0))


def test_a_data_start_needs_a_map() -> None:
    with pytest.raises(ValueError, match="transform 'none' has none"):
        SimVQ(8, 3, transform="none", init="data")


@pytest.mark.parametrize("family", [VQ, EMAVQ])
def test_kmeans_start_finds_separated_clusters(family: type[VQ] | type[EMAVQ]) -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 9.0], [9.0, 0.0], [-9.0, -9.0]])
    z = centres.repeat(50, 1) + 0.1 * torch.randn(150, 2)
    quantizer = family(9, 2, init="kmeans")
    before = quantizer(z).losses["commitment"]
    quantizer.eval()
    assert before < 0.02
    assert not quantizer.waits_for_data


def test_kmeans_with_fewer_latents_than_codes_leaves_the_rest_at_their_start() -> None:
    torch.manual_seed(0)
    quantizer = VQ(6, 2, init="kmeans")
    before = quantizer.codebook().detach().clone()
    z = torch.randn(4, 2)
    quantizer.initialize(z)
    assert torch.equal(quantizer.codebook()[4:], before[4:])
    assert {tuple(row) for row in quantizer.codebook()[:4].tolist()} == {
        tuple(row) for row in z.tolist()
    }


def test_cosine_kmeans_works_on_the_sphere() -> None:
    torch.manual_seed(0)
    quantizer = CosineVQ(5, 3, init="kmeans")
    quantizer.initialize(torch.randn(40, 3) * 100)
    assert_close(quantizer.codebook().norm(dim=1), torch.ones(5))
