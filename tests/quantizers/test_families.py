"""Each family against the formula of its paper, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from simvq_moe import FSQ, LFQ, VQ, ResidualQuantizer, SimVQ
from simvq_moe.core.usage import counters
from simvq_moe.quantizers import (
    BSQ,
    IBQ,
    MLPVQ,
    CosineVQ,
    GroupedQuantizer,
    GroupVQ,
    Projected,
    Quantizer,
)
from simvq_moe.quantizers.kinds.group import map_by_group


def test_fsq_rounds_the_bounded_latent_and_counts_in_mixed_radix() -> None:
    levels = [8, 5, 2]
    quantizer = FSQ(levels).double()
    z = (3 * torch.randn(50, 3, dtype=torch.float64)).requires_grad_()
    # half of levels - 1, a thousandth outside, and of two values inside, as the paper has it
    half = torch.tensor([3.5035, 2.002, 0.4995], dtype=torch.float64)
    offset = torch.tensor([0.5, 0, 0.5], dtype=torch.float64)
    shift = torch.cat([torch.atanh(offset[:2] / half[:2]), torch.tan(offset[2:] / half[2:])])
    bounded = torch.tanh(z + shift) * half - offset
    width = torch.tensor([4, 2, 1])
    number = bounded.round().long() + width
    out = quantizer(z)
    assert torch.equal(out.ids, number[:, 0] + 8 * number[:, 1] + 40 * number[:, 2])
    assert_close(out.z_q, bounded.round() / width)
    weights = torch.randn(50, 3, dtype=torch.float64)
    naive = torch.autograd.grad((weights * bounded / width).sum(), z)
    assert_close(torch.autograd.grad((weights * out.z_q).sum(), z), naive)
    assert out.losses == {}
    assert float(out.loss) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fsq_reaches_every_code_in_every_precision_and_decode_inverts_encode(
    dtype: torch.dtype,
) -> None:
    quantizer = FSQ([8, 8, 8, 5, 5, 5])
    ids = torch.arange(quantizer.codes)
    codes = quantizer.codebook()
    assert len(codes.unique(dim=0)) == 64_000
    half = (quantizer.levels - 1) * 1.001 / 2
    offset = (quantizer.levels % 2 == 0) / 2
    # the latent in the middle of each cell
    centre = torch.atanh(((codes * (quantizer.levels // 2)) + offset) / half * 0.99)
    z = (centre - torch.atanh(offset / half)).to(dtype)
    assert torch.equal(quantizer.encode(z), ids)


def test_fsq_does_not_leave_its_grid_at_many_levels() -> None:
    quantizer = FSQ([3000, 3001])
    for extreme in (-50.0, 50.0):
        out = quantizer(torch.full((1, 2), extreme))
        assert torch.equal(quantizer.decode(out.ids), out.z_q)
        assert float(out.z_q.abs().max()) <= 1


@pytest.mark.parametrize("family", [LFQ, BSQ])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_binary_codes_and_entropies_equal_the_sums_over_all_codes(
    family: type[LFQ], width: int
) -> None:
    torch.manual_seed(0)
    quantizer = family(width, temperature=0.7, entropy_weight=0.3, diversity_weight=1.5).double()
    z = torch.randn(30, width, dtype=torch.float64, requires_grad=True)
    scale = 1.0 if family is LFQ else width**-0.5
    x = z if family is LFQ else F.normalize(z, dim=-1)
    book = torch.tensor(list(itertools.product([-scale, scale], repeat=width))).double()
    assert_close(quantizer.codebook(torch.float64), book)
    out = quantizer(z)
    assert torch.equal(out.ids, torch.cdist(x, book).argmin(1))
    p = (2 * x @ book.T / 0.7).softmax(1)
    token = -(p * p.log()).sum(1).mean()
    mean = p.mean(0)
    diversity = -(mean * mean.log()).sum()
    commitment = (x - book[out.ids]).square().mean()
    assert_close(
        out.losses,
        {"commitment": commitment, "token_entropy": token, "codebook_entropy": diversity},
    )
    naive = 0.25 * commitment + 0.3 * (token - 1.5 * diversity)
    assert_close(out.loss, naive)
    assert_close(torch.autograd.grad(out.loss, z), torch.autograd.grad(naive, z))


def test_cosine_codes_are_the_nearest_by_angle() -> None:
    torch.manual_seed(0)
    quantizer = CosineVQ(20, 4).double()
    z = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    out = quantizer(z)
    book = F.normalize(quantizer.bank.base, dim=1)
    x = F.normalize(z, dim=1)
    assert torch.equal(out.ids, (x @ book.T).argmax(1))
    naive = 1.25 * (x - book[out.ids]).square().mean()
    assert_close(out.loss, naive)
    # straight-through onto the normalized latent
    assert_close(
        torch.autograd.grad(out.z_q.sin().sum(), z),
        torch.autograd.grad((x * book[out.ids].cos()).sum(), z),
    )


def test_ibq_gives_every_code_the_gradient_of_the_softmax() -> None:
    torch.manual_seed(0)
    quantizer = IBQ(9, 4).double()
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    out = quantizer(z)
    E = quantizer.bank.base
    p = (z @ E.T).softmax(1)
    hard = F.one_hot(p.argmax(1), 9).double()
    assert torch.equal(out.ids, p.argmax(1))
    z_q = (hard + p - p.detach()) @ E
    e = hard @ E
    # the entropies as in the published code, temperature 0.01 and weight 0.05
    log_soft = (z @ E.T / 0.01).log_softmax(1)
    soft = log_soft.exp()
    token, mean = -(soft * log_soft).sum(1).mean(), soft.mean(0)
    naive = (
        (z_q - z).square().mean()
        + (z - e.detach()).square().mean()
        + 0.25 * (e - z.detach()).square().mean()
        + 0.05 * (token + (mean * mean.log()).sum())
    )
    assert_close(out.loss, naive)
    weights = torch.randn(6, 4, dtype=torch.float64)
    found = torch.autograd.grad(out.loss + (weights * out.z_q).sum(), [z, E])
    assert_close(found, torch.autograd.grad(naive + (weights * z_q).sum(), [z, E]))
    assert bool((found[1].abs().sum(1) > 0).all())


def test_group_codes_have_the_map_of_their_group() -> None:
    torch.manual_seed(0)
    quantizer = GroupVQ(6, 3, groups=2).double()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(torch.randn_like(parameter))
    state = quantizer.state_dict()
    q, W, b = state["bank.base"], state["bank.W"], state["bank.bias"]
    naive = torch.stack([q[i // 3, i % 3] @ W[i // 3] + b[i // 3] for i in range(6)])
    assert_close(quantizer.codebook().detach(), naive)
    ids = torch.tensor([[5, 0], [3, 3]])
    assert_close(quantizer.decode(ids).detach(), naive[ids])
    before = quantizer.codebook().detach().clone()
    quantizer(before[4:5] + 0.01).loss.backward()
    torch.optim.SGD(quantizer.parameters(), lr=0.1).step()
    moved = (quantizer.codebook() - before).norm(dim=1) > 0
    assert moved.tolist() == [False] * 3 + [True] * 3
    with pytest.raises(ValueError, match="groups 2 must divide codes 7"):
        GroupVQ(7, 3, groups=2)


@settings(deadline=None)
@given(
    tokens=st.integers(0, 40),
    width=st.integers(1, 6),
    groups=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_each_row_meets_the_map_of_its_group(
    tokens: int, width: int, groups: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=g, dtype=torch.float64)
    maps = torch.randn(groups, width, width, generator=g, dtype=torch.float64, requires_grad=True)
    group = torch.randint(groups, (tokens,), generator=g)
    found = map_by_group(x, group, maps)
    naive = (x[:, :, None] * maps[group]).sum(1)
    assert_close(found, naive)
    gradients = [torch.autograd.grad(y.sin().sum(), maps)[0] for y in (found, naive)]
    assert_close(*gradients)


def test_the_lookup_of_groups_costs_what_its_tokens_cost() -> None:
    quantizer, ids = GroupVQ(1024, 8, groups=4), torch.arange(0, 1024, 16)
    with FlopCounterMode(display=False) as counted:
        quantizer.lookup(ids)
    # a product and a sum for each of 8 x 8 entries; four tiles of 8 tokens may be padding
    assert counted.get_total_flops() <= 2 * (len(ids) + 4 * 8) * 8 * 8


def test_one_group_is_simvq_with_a_bias() -> None:
    torch.manual_seed(0)
    grouped = GroupVQ(16, 4, groups=1)
    torch.manual_seed(0)
    single = SimVQ(16, 4, bias=True)
    z = torch.randn(9, 4)
    assert torch.equal(grouped(z).ids, single(z).ids)
    assert_close(grouped(z).loss, single(z).loss)


def test_a_perceptron_starts_at_the_base_and_moves_every_code() -> None:
    torch.manual_seed(0)
    quantizer = MLPVQ(16, 4)
    before = quantizer.codebook().detach().clone()
    assert torch.equal(before, quantizer.base)
    quantizer(before[3:4] + 0.1).loss.backward()
    torch.optim.SGD(quantizer.parameters(), lr=0.1).step()
    assert bool(((quantizer.codebook() - before).norm(dim=1) > 0).all())


def residual() -> ResidualQuantizer:
    torch.manual_seed(0)
    return ResidualQuantizer([VQ(8, 4), SimVQ(9, 4), VQ(7, 4)]).double()


def test_residual_levels_quantize_what_is_left_and_add_up() -> None:
    quantizer = residual()
    z = torch.randn(2, 5, 4, dtype=torch.float64)
    out = quantizer(z)
    left, total, loss = z, torch.zeros_like(z), torch.zeros(())
    for number, level in enumerate(quantizer):
        assert isinstance(level, Quantizer)
        book = level.codebook()
        ids = torch.cdist(left, book.expand(2, -1, -1)).argmin(-1)
        assert torch.equal(out.ids[..., number], ids)
        loss = loss + 1.25 * (left - book[ids]).square().mean()
        left, total = left - book[ids], total + book[ids]
    assert_close(out.z_q, total)
    assert_close(out.loss, loss)
    assert torch.equal(quantizer.encode(z), out.ids)
    assert [int(c.counts.sum()) for c in counters(quantizer)] == [10, 10, 10]


def test_residual_gradient_reaches_the_latent_once_and_every_level_commits() -> None:
    quantizer = residual()
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    out = quantizer(z)
    (once,) = torch.autograd.grad(out.z_q.sum(), z, retain_graph=True)
    assert_close(once, torch.ones_like(z))
    (committed,) = torch.autograd.grad(out.loss, z)
    left, expected = z.detach(), torch.zeros_like(z)
    for number, level in enumerate(quantizer):
        e = level.decode(out.ids[:, number])
        expected += 0.25 * 2 * (left - e) / z.numel()
        left = left - e
    assert_close(committed, expected.detach())


def test_heads_quantize_their_share_of_the_channels() -> None:
    torch.manual_seed(0)
    heads = [VQ(8, 3), SimVQ(9, 1)]
    quantizer = GroupedQuantizer(heads).double()
    z = torch.randn(7, 4, dtype=torch.float64)
    out = quantizer(z)
    first, second = heads[0](z[:, :3]), heads[1](z[:, 3:])
    assert torch.equal(out.z_q, torch.cat([first.z_q, second.z_q], 1))
    assert torch.equal(out.ids, torch.stack([first.ids, second.ids], 1))
    error = (out.z_q - z).square().mean()
    assert_close(out.losses, {"codebook": error, "commitment": error})


def test_a_projection_wraps_a_narrow_codebook() -> None:
    torch.manual_seed(0)
    inner = CosineVQ(12, 3)
    quantizer = Projected(inner, 8)
    z = torch.randn(5, 8)
    out = quantizer(z)
    assert torch.equal(out.ids, inner.encode(quantizer.project_in(z)))
    assert_close(out.z_q, quantizer.project_out(inner.decode(out.ids)))
    assert_close(quantizer.codebook()[out.ids], out.z_q)
    assert quantizer.usage is inner.usage


def test_parts_that_do_not_fit_together_are_named() -> None:
    with pytest.raises(ValueError, match=r"levels of widths \[3, 4\]"):
        ResidualQuantizer([VQ(4, 3), VQ(4, 4)])
    with pytest.raises(ValueError, match="as many ids a token"):
        GroupedQuantizer([VQ(4, 3), ResidualQuantizer([VQ(4, 3)])])
    with pytest.raises(ValueError, match="at least 2 values"):
        FSQ([4, 1])


def test_two_values_a_channel_use_their_codes_and_pass_a_gradient() -> None:
    torch.manual_seed(0)
    quantizer = FSQ([2] * 6)
    z = torch.randn(5000, 6, requires_grad=True)
    out = quantizer(z)
    # the threshold is the tangent's, tan(0.5 / 0.4995)
    assert torch.equal(out.z_q > -0.5, z > -torch.tan(torch.tensor(0.5 / 0.4995)))
    assert len(out.ids.unique()) > 32
    slope = torch.autograd.grad(out.z_q.sum(), z)[0]
    assert float(slope.median()) > 0.05
    assert len(quantizer.codebook().unique(dim=0)) == 64


def test_no_entropy_weight_leaves_the_entropies_of_ibq_out() -> None:
    torch.manual_seed(0)
    out = IBQ(9, 4, entropy_weight=0.0)(torch.randn(6, 4))
    assert set(out.losses) == {"codebook", "commitment", "index"}
