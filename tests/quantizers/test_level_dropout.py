"""An item goes through its first levels alone, and leaves no trace in those that it skips."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from simvq_moe import EMAVQ, VQ, ResidualQuantizer
from simvq_moe.config.checks import check
from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError
from simvq_moe.quantizers import PADDING, AnyQuantizer, GroupedQuantizer, Projected

LEVELS, WIDTH, CODES = 4, 3, 8


def quantizer(kind: type[VQ] | type[EMAVQ] = VQ, dropout: float = 1.0) -> ResidualQuantizer:
    torch.manual_seed(0)
    return ResidualQuantizer([kind(CODES, WIDTH) for _ in range(LEVELS)], dropout=dropout).double()


def levels_of(ids: torch.Tensor) -> torch.Tensor:
    """How many levels each token went through, which are its first ones."""
    gone = ids != PADDING
    assert torch.equal(gone, gone.cummin(-1).values)
    return gone.sum(-1)


@pytest.mark.parametrize("dropout", [0.5, 1.0])
def test_items_go_through_a_uniform_number_of_levels_and_others_through_all(dropout: float) -> None:
    rvq, items = quantizer(dropout=dropout), 4000
    found = levels_of(rvq(torch.randn(items, 2, 3, WIDTH).double()).ids)
    assert torch.equal(found, found[:, :1, :1].expand_as(found))
    share = torch.bincount(found[:, 0, 0], minlength=LEVELS + 1)[1:] / items
    expected = torch.full((LEVELS,), dropout / LEVELS)
    expected[-1] += 1 - dropout
    assert_close(share, expected, rtol=0, atol=0.03)
    assert int((rvq.eval()(torch.randn(items, WIDTH).double()).ids == PADDING).sum()) == 0


@pytest.mark.parametrize("masked", [False, True])
def test_values_and_losses_are_those_of_each_item_by_itself(masked: bool) -> None:
    rvq, z = quantizer(), torch.randn(12, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(12, 5) < 0.7 if masked else None
    out = rvq(z, mask)
    valid = torch.ones(12, 5, dtype=torch.bool) if mask is None else mask
    terms = {"codebook": torch.zeros(()).double(), "commitment": torch.zeros(()).double()}
    for item, token in valid.nonzero().tolist():
        left = z[item, token]
        value = torch.zeros(WIDTH).double()
        for level, code in zip(rvq, out.ids[item, token].tolist(), strict=True):
            if code == PADDING:
                break
            assert code == int(level.encode(left - value))
            e = level.lookup(torch.tensor(code))
            terms["codebook"] = terms["codebook"] + (e - (left - value).detach()).square().sum()
            terms["commitment"] = terms["commitment"] + (left - value - e.detach()).square().sum()
            value = value + e.detach()
        assert_close(out.z_q[item, token].detach(), value)
    numbers = int(valid.sum()) * WIDTH
    for name, term in terms.items():
        assert_close(out.losses[name], term / numbers)
    inputs = [z, *rvq.parameters()]
    by_hand = terms["codebook"] / numbers + 0.25 * terms["commitment"] / numbers
    found = torch.autograd.grad(out.loss, inputs)
    assert_close(found, torch.autograd.grad(by_hand, inputs))


def test_what_is_skipped_enters_no_average_and_no_count() -> None:
    rvq = quantizer(EMAVQ)
    z = torch.randn(40, WIDTH).double()
    kept = levels_of(rvq(z).ids)
    for place, level in enumerate(rvq):
        assert isinstance(level, EMAVQ)
        assert int(level.usage.sum()) == int((kept > place).sum())
        assert float(level.counts.sum()) == pytest.approx(
            CODES + 0.01 * (int((kept > place).sum()) - CODES), rel=1e-6
        )


def test_ids_of_the_first_levels_decode_to_their_sum_and_more_than_all_are_refused() -> None:
    rvq = quantizer(dropout=0.0).eval()
    z = torch.randn(9, WIDTH).double()
    ids, value = rvq.encode(z), torch.zeros(9, WIDTH).double()
    for place, level in enumerate(rvq):
        value = value + level.decode(ids[:, place])
        assert_close(rvq.decode(ids[:, : place + 1]), value)
    with pytest.raises(ValueError, match="ids of 5 levels, but there are 4"):
        rvq.decode(torch.cat([ids, ids[:, :1]], 1))


@pytest.mark.parametrize("masked", [False, True])
def test_ids_of_training_decode_to_the_forward_value(masked: bool) -> None:
    rvq, z = quantizer(), torch.randn(50, 2, WIDTH).double()
    mask = torch.rand(50, 2) < 0.7 if masked else None
    out = rvq(z, mask)
    assert int((out.ids == PADDING).any(-1).sum()) > 0
    assert_close(rvq.decode(out.ids), out.z_q)


def test_levels_within_heads_and_projections_are_dropped_alike_for_an_item() -> None:
    heads = GroupedQuantizer([quantizer(), Projected(quantizer(), 2 * WIDTH).double()])
    z = torch.randn(400, 2, 3 * WIDTH).double()
    out = heads.train()(z)
    gone = [levels_of(out.ids[..., head, :]) for head in range(2)]
    assert torch.equal(gone[0], gone[1])
    assert torch.equal(gone[0], gone[0][:, :1].expand(-1, 2))
    share = torch.bincount(gone[0][:, 0], minlength=LEVELS + 1)[1:] / len(z)
    assert_close(share, torch.full((LEVELS,), 1 / LEVELS), rtol=0, atol=0.1)
    assert_close(heads.decode(out.ids), out.z_q)
    assert int((heads.eval()(z).ids == PADDING).sum()) == 0


def test_without_dropout_and_with_its_draw_of_all_levels_nothing_differs() -> None:
    plain, dropped = quantizer(dropout=0.0), quantizer(dropout=1e-12)
    z = torch.randn(7, 2, WIDTH).double()
    a, b = plain(z), dropped(z)
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.z_q, b.z_q)
    assert_close(a.loss, b.loss)


def test_it_comes_from_the_config_and_needs_levels() -> None:
    flags = ["--quantizer.residual_levels", "3", "--quantizer.level_dropout", "0.5"]
    config = with_flags(Config(), flags, "train")
    check(config)
    built = config.quantizer.build()
    assert isinstance(built, ResidualQuantizer)
    assert built.dropout == 0.5
    folded = config.quantizer.folded()
    assert folded is not None
    assert isinstance(folded.build(), AnyQuantizer)
    for kind in ("ema", "lfq --quantizer.width 9"):
        one = f"--quantizer.kind {kind} --quantizer.level_dropout 0.5"
        with pytest.raises(
            ConfigError, match=r"level_dropout 0\.5 with quantizer\.residual_levels 1"
        ):
            check(with_flags(Config(), one.split(), "train"))
