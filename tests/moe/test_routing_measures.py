"""Router measures against their definitions, at chance, at their extremes, and in any order."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from simvq_moe.moe.routing_measures import (
    boundary_margin,
    co_activation,
    confidence,
    covariance,
    fluctuation,
    geometry,
    importance_cv2,
    information,
    label_counts,
    output_similarity,
    partner_share,
    router_entropy,
    row_exponent,
    saturation,
    specialization,
    uniform_routing,
)

TOKENS, EXPERTS, TOP_K, LABELS = 60, 7, 3, 4


def with_open_choices(ids: Tensor) -> Tensor:
    """Some choices at the end of a row open, some rows open as a whole."""
    ids = ids.clone()
    ids[::3, -1] = -1
    ids[::10] = -1
    return ids


def routings() -> list[Tensor]:
    full = uniform_routing(TOKENS, EXPERTS, TOP_K, seed=1)
    return [full, with_open_choices(full), full[:, :1]]


def labels() -> Tensor:
    return torch.randint(LABELS, (TOKENS,), generator=torch.Generator().manual_seed(2))


def logits() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.randn(TOKENS, EXPERTS, dtype=torch.float64, generator=generator)


def chosen(row: Tensor) -> set[int]:
    return {i for i in row.tolist() if i >= 0}


@pytest.mark.parametrize("ids", routings())
@pytest.mark.parametrize("open_choices", [False, True])
def test_saturation_is_the_shared_part_of_the_final_choice(ids: Tensor, open_choices: bool) -> None:
    final = uniform_routing(TOKENS, EXPERTS, TOP_K, seed=4)
    final = with_open_choices(final) if open_choices else final
    shared = sum(len(chosen(a) & chosen(b)) for a, b in zip(ids, final, strict=True))
    assert saturation(ids, final) == shared / sum(len(chosen(b)) for b in final)
    assert saturation(final.flip(1), final) == 1
    assert saturation(torch.full_like(final, -1), final) == 0
    if not open_choices:
        each = [len(chosen(a) & chosen(b)) / TOP_K for a, b in zip(ids, final, strict=True)]
        assert_close(saturation(ids, final), sum(each) / TOKENS)


@pytest.mark.parametrize("ids", routings())
def test_fluctuation_is_the_share_of_first_choices_that_changed(ids: Tensor) -> None:
    before = with_open_choices(uniform_routing(TOKENS, EXPERTS, TOP_K, seed=4))
    pairs = list(zip(ids[:, 0].tolist(), before[:, 0].tolist(), strict=True))
    taken = [(a, b) for a, b in pairs if a >= 0 or b >= 0]
    assert fluctuation(ids, before) == sum(a != b for a, b in taken) / len(taken)
    assert fluctuation(ids, ids) == 0
    assert fluctuation((ids + 1) % EXPERTS, ids % EXPERTS) == 1


@pytest.mark.parametrize("ids", routings())
def test_co_activation_counts_every_pair_of_a_tokens_experts(ids: Tensor) -> None:
    together, partner_tokens, all_tokens = co_activation(ids, EXPERTS), 0, 0
    assert together.dtype == torch.float64
    for i in range(EXPERTS):
        own = [chosen(row) for row in ids if i in chosen(row)]
        shared = [sum(j in row for row in own) if i != j else 0 for j in range(EXPERTS)]
        assert_close(together[i], torch.tensor(shared).double() / max(len(own), 1))
        partner_tokens, all_tokens = partner_tokens + max(shared), all_tokens + len(own)
    assert_close(partner_share(ids, EXPERTS), partner_tokens / all_tokens)


def test_pairs_of_distant_ranks_count_as_much_as_those_of_neighbours() -> None:
    ids = torch.tensor([[0, 1, 2]] * 5)
    assert_close(co_activation(ids, 3), 1 - torch.eye(3, dtype=torch.float64))


def test_partners_are_all_none_or_chance() -> None:
    always = torch.arange(4).view(2, 2).repeat(50, 1)
    assert partner_share(always, 4) == 1
    assert partner_share(always[:, :1], 4) == 0
    chance = partner_share(uniform_routing(20_000, EXPERTS, TOP_K), EXPERTS)
    even = (TOP_K - 1) / (EXPERTS - 1)
    # a maximum of six shares, each with a standard error of 0.005
    assert even < chance < even + 0.02


@pytest.mark.parametrize("ids", routings())
def test_specialization_is_the_share_of_a_labels_tokens(ids: Tensor) -> None:
    named = labels()
    counts = label_counts(ids, named, EXPERTS, LABELS + 1)
    shares = specialization(ids, named, EXPERTS, LABELS + 1)
    for label in range(LABELS + 1):
        own = [chosen(row) for row, n in zip(ids, named.tolist(), strict=True) if n == label]
        has = torch.tensor([sum(i in row for row in own) for i in range(EXPERTS)])
        assert_close(counts[:, label], has)
        assert_close(shares[:, label], has.double() / max(len(own), 1))


def test_specialization_of_chance_is_k_over_n() -> None:
    ids = uniform_routing(20_000, EXPERTS, TOP_K)
    shares = specialization(ids, torch.arange(20_000) % LABELS, EXPERTS, LABELS)
    # four standard errors of a share over 5,000 tokens
    assert_close(shares, torch.full_like(shares, TOP_K / EXPERTS), rtol=0, atol=0.03)
    assert_close(shares.sum(0), torch.full_like(shares[0], TOP_K))


@pytest.mark.parametrize("ids", routings())
def test_information_is_that_of_the_joint_shares_less_that_of_shuffled_labels(ids: Tensor) -> None:
    def bits(named: list[int]) -> float:
        draws = [(i, n) for row, n in zip(ids, named, strict=True) for i in chosen(row)]
        total = 0.0
        for i in range(EXPERTS):
            for label in range(LABELS):
                p = draws.count((i, label)) / len(draws)
                p_i = sum(a == i for a, _ in draws) / len(draws)
                p_label = sum(b == label for _, b in draws) / len(draws)
                total += p * math.log2(p / (p_i * p_label)) if p else 0.0
        return total

    named = labels()
    generator = torch.Generator().manual_seed(0)
    shuffled = [named[torch.randperm(TOKENS, generator=generator)].tolist() for _ in range(4)]
    by_chance = sum(bits(order) for order in shuffled) / 4
    assert_close(information(ids, named, EXPERTS), bits(named.tolist()) - by_chance)


def test_information_is_nothing_by_chance_and_all_for_an_expert_a_label() -> None:
    chance = uniform_routing(4_000, 64, 4)
    many = torch.randint(500, (4_000,), generator=torch.Generator().manual_seed(5))
    # uncorrected, 64 experts and 500 labels share more than a bit by chance
    assert abs(information(chance, many, 64)) < 0.02
    label = torch.arange(8_000) % 4
    # of 8,000 tokens chance explains 9 cells / (2 * 8,000 ln 2) bits
    assert_close(information(label[:, None], label, 4), 2.0, rtol=0, atol=0.002)
    assert information(torch.zeros(8, 1, dtype=torch.int64), label[:8], 4) == 0


def test_measures_leave_the_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    information(uniform_routing(20, EXPERTS, TOP_K), torch.arange(20) % 3, EXPERTS)
    assert_close(torch.get_rng_state(), before)


def test_output_similarity_is_the_mean_cosine_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(6)
    outputs = torch.randn(5, 9, 4, dtype=torch.float64, generator=generator)
    outputs[2, 3] = 0
    cosines = [
        torch.nn.functional.cosine_similarity(outputs[i, t], outputs[j, t], dim=0)
        for i, j in combinations(range(5), 2)
        for t in range(9)
    ]
    assert_close(output_similarity(outputs), float(torch.stack(cosines).mean()))
    same = outputs[:1].repeat(3, 1, 1) * torch.tensor([1.0, 2.0, 0.1]).view(3, 1, 1)
    assert_close(output_similarity(same), 1.0)
    orthogonal = torch.eye(4)[:, None].expand(4, 6, 4)
    assert_close(output_similarity(orthogonal), 0.0)
    assert_close(output_similarity(torch.stack([same[0], -same[0]])), -1.0)
    with pytest.raises(ValueError, match=r"1 experts have no pair"):
        output_similarity(outputs[:1])


def test_scores_measures_are_means_over_tokens_of_their_definitions() -> None:
    entropies, differences, margins = [], [], []
    for row in logits().tolist():
        weights = [math.exp(score) for score in row]
        p = sorted((w / sum(weights) for w in weights), reverse=True)
        entropies.append(-sum(q * math.log(q) for q in p) / math.log(EXPERTS))
        differences.append(p[0] - p[1])
        ordered = sorted(row, reverse=True)
        margins.append(ordered[TOP_K - 1] - ordered[TOP_K])
    assert_close(router_entropy(logits()), sum(entropies) / TOKENS)
    assert_close(confidence(logits()), sum(differences) / TOKENS)
    assert_close(boundary_margin(logits(), TOP_K), sum(margins) / TOKENS)


def test_scores_measures_at_their_extremes() -> None:
    even, sure = torch.zeros(5, EXPERTS), 1e4 * torch.eye(EXPERTS)
    assert_close([router_entropy(even), router_entropy(sure)], [1.0, 0.0])
    assert_close([confidence(even), confidence(sure)], [0.0, 1.0])
    assert_close([boundary_margin(even, 2), boundary_margin(sure, 1)], [0.0, 1e4])
    assert_close([router_entropy(even[:, :1]), confidence(even[:, :1])], [0.0, 1.0])
    with pytest.raises(ValueError, match=r"top_k 7 of 7 experts has no boundary"):
        boundary_margin(even, EXPERTS)


@pytest.mark.parametrize("ids", routings())
def test_importance_is_the_sum_of_gates(ids: Tensor) -> None:
    gates = torch.rand(*ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    importance = [0.0] * EXPERTS
    for row, weights in zip(ids.tolist(), gates.tolist(), strict=True):
        for i, gate in zip(row, weights, strict=True):
            importance[i] += gate if i >= 0 else 0.0
    mean = sum(importance) / EXPERTS
    variance = sum((one - mean) ** 2 for one in importance) / EXPERTS
    assert_close(importance_cv2(gates, ids, EXPERTS), variance / mean**2)


def test_importance_at_its_extremes() -> None:
    gates = torch.ones(EXPERTS, 1)
    assert_close(importance_cv2(gates, torch.arange(EXPERTS)[:, None], EXPERTS), 0.0)
    one_only = torch.zeros(EXPERTS, 1, dtype=torch.int64)
    assert_close(importance_cv2(gates, one_only, EXPERTS), EXPERTS - 1.0)


OF_IDS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "saturation": lambda ids, _: saturation(ids, ids.roll(1, 0)),
    "fluctuation": lambda ids, _: fluctuation(ids, ids.roll(1, 0)),
    "partner_share": lambda ids, _: partner_share(ids, EXPERTS),
    "information": lambda ids, named: information(ids, named, EXPERTS),
}


@pytest.mark.parametrize("name", OF_IDS)
@pytest.mark.parametrize("ids", routings())
def test_renaming_experts_and_labels_changes_no_measure(name: str, ids: Tensor) -> None:
    generator = torch.Generator().manual_seed(8)
    experts = torch.randperm(EXPERTS, generator=generator)
    names = torch.randperm(LABELS, generator=generator)
    renamed = torch.where(ids < 0, ids, experts[ids])
    before = OF_IDS[name](ids, labels())
    assert_close(OF_IDS[name](renamed, names[labels()]), before)


def test_the_order_of_experts_and_tokens_changes_no_measure_of_scores_and_outputs() -> None:
    generator = torch.Generator().manual_seed(9)
    experts = torch.randperm(EXPERTS, generator=generator)
    tokens = torch.randperm(TOKENS, generator=generator)
    scores, moved = logits(), logits()[tokens][:, experts]
    assert_close(router_entropy(moved), router_entropy(scores))
    assert_close(confidence(moved), confidence(scores))
    assert_close(boundary_margin(moved, TOP_K), boundary_margin(scores, TOP_K))
    outputs = scores.T[:, :, None] * torch.arange(1.0, 4).double() + scores.T[:, :, None].square()
    assert_close(output_similarity(outputs[experts][:, tokens]), output_similarity(outputs))


def test_uniform_routing_chooses_different_experts_evenly_and_scores_as_chance_does() -> None:
    ids = uniform_routing(20_000, EXPERTS, TOP_K)
    assert all(len(set(row)) == TOP_K for row in ids[:500].tolist())
    other = uniform_routing(20_000, EXPERTS, TOP_K, seed=1)
    assert not torch.equal(ids, other)
    # four standard errors of a share of 20,000 tokens
    assert_close(saturation(ids, other), TOP_K / EXPERTS, rtol=0, atol=0.01)
    assert_close(fluctuation(ids, other), 1 - 1 / EXPERTS, rtol=0, atol=0.01)


def test_geometry_is_that_of_eigenvalues_in_numpy() -> None:
    generator = torch.Generator().manual_seed(7)
    scales = torch.tensor([4.0, 2, 1, 1, 0.5])
    x = torch.randn(300, 5, generator=generator) * scales + 1
    logits = torch.randn(300, 3, generator=generator)
    found = geometry(x, logits)
    X = x.double().numpy()
    variances = np.linalg.eigvalsh(np.cov(X.T, bias=True))
    shares = variances / variances.sum()
    assert_close(found["input_rank"], float(np.exp(-(shares * np.log(shares)).sum())))
    assert_close(found["input_condition"], float(variances[-1] / variances[0]))
    mean = X.mean(0)
    assert_close(found["input_mean_share"], float(mean @ mean / (X**2).sum(1).mean()))
    # what all experts have in common moves no choice
    assert_close(geometry(x, logits + x[:, :1])["logits_rank"], found["logits_rank"])
    assert 1.9 < found["logits_rank"] <= 2


def test_rows_that_grow_with_a_power_of_the_variance_have_it_for_exponent() -> None:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(5_000, 6, dtype=torch.float64, generator=generator)
    x = x * torch.tensor([8.0, 4, 2, 1, 0.5, 0.25])
    of_input = covariance(x)
    assert_close(of_input, (x - x.mean(0)).T @ (x - x.mean(0)) / len(x))
    variances, axes = torch.linalg.eigh(of_input)
    for p in (-0.5, 0.0, 0.3):
        rows = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator)).Q
        assert_close(row_exponent(of_input, rows * variances**p @ axes.T), p, rtol=0, atol=1e-9)
    assert math.isnan(row_exponent(covariance(torch.ones(3, 6).double()), torch.ones(2, 6)))
