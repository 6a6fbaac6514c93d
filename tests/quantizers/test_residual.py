"""Each residual level refines what the ones before it left over, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from simvq_moe import EMAVQ, FSQ, LFQ, VQ, ResidualQuantizer, SimVQ
from simvq_moe.config.checks import check
from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError
from simvq_moe.quantizers import BSQ, AnyQuantizer, CosineVQ, GroupedQuantizer, Projected

peer: Any = pytest.importorskip("vector_quantize_pytorch")


@pytest.mark.parametrize("levels", [[8, 8, 8], [5, 5], [3, 4, 7]])
@pytest.mark.parametrize("number", [2, 3])
def test_levels_of_fsq_are_those_of_the_peer(levels: list[int], number: int) -> None:
    torch.manual_seed(0)
    z = torch.randn(1, 500, len(levels))
    ours = ResidualQuantizer([FSQ(levels) for _ in range(number)]).eval()
    theirs = peer.ResidualFSQ(levels=levels, num_quantizers=number).eval()
    value, ids = theirs(z)
    out = ours(z)
    assert torch.equal(out.ids, ids.long())
    assert_close(out.z_q, value)
    assert_close(ours.decode(out.ids), value)
    assert torch.equal(ours.encode(z), out.ids)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float32, torch.float64])
def test_levels_of_fsq_are_exact_whatever_is_the_default_dtype(default: torch.dtype) -> None:
    levels, number = [5, 3], 3
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        quantizer = ResidualQuantizer([FSQ(levels) for _ in range(number)])
        z = torch.randn(400, 2, dtype=torch.float64)
        target = next(iter(quantizer)).target(z)
    finally:
        torch.set_default_dtype(before)
    count = torch.tensor(levels).double()
    bound = count / (count - 1)
    assert_close(target, bound * (z / bound).tanh(), rtol=1e-14, atol=0)
    ids = torch.randint(15, (50, number))
    value = torch.zeros(50, 2).double()
    for place in range(number):
        channels = torch.stack([ids[:, place] % 5, ids[:, place] // 5], 1)
        value += (2 * channels / (count - 1) - 1) / count**place
    assert_close(quantizer.decode(ids, torch.float64), value, rtol=1e-14, atol=1e-15)


def test_levels_of_lfq_are_those_of_the_peer() -> None:
    torch.manual_seed(0)
    z = torch.randn(1, 500, 6)
    theirs = peer.ResidualLFQ(dim=6, codebook_size=64, num_quantizers=3).eval()
    value, ids, _ = theirs(z)
    out = ResidualQuantizer([LFQ(6) for _ in range(3)]).eval()(z)
    assert torch.equal(out.ids, ids)
    assert_close(out.z_q, value)


LEVELS = {
    "fsq": lambda: FSQ([8, 8]),
    "fsq of two values": lambda: FSQ([2, 2]),
    "lfq": lambda: LFQ(2),
    "groups": lambda: GroupedQuantizer([FSQ([5]), LFQ(1)]),
}


@pytest.mark.parametrize("name", list(LEVELS))
def test_every_grid_level_halves_the_error_and_uses_its_codes(name: str) -> None:
    z = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.7
    errors = []
    for number in (1, 2, 3):
        quantizer = ResidualQuantizer([LEVELS[name]() for _ in range(number)]).eval()
        out = quantizer(z)
        target = next(iter(quantizer)).target(z)
        errors.append(float((out.z_q - target).square().mean()))
        flat = out.ids.flatten(1)
        assert number == 1 or all(len(level.unique()) > 1 for level in flat.unbind(1))
    assert errors[2] < 0.5 * errors[1] < 0.25 * errors[0]


def test_a_grid_behind_other_kinds_is_the_grid_by_itself() -> None:
    torch.manual_seed(0)
    first, grid = EMAVQ(12, 4), FSQ([3] * 4)
    z = torch.randn(50, 4)
    out = ResidualQuantizer([first, grid]).eval()(z)
    assert torch.equal(out.ids[:, 1], FSQ([3] * 4).encode(z - first.decode(out.ids[:, 0])))


@pytest.mark.parametrize("family", [lambda: CosineVQ(8, 4), lambda: BSQ(4)])
def test_codes_of_one_length_refine_nothing_and_are_refused(family: Any) -> None:
    with pytest.raises(ValueError, match=r"level 1 of 2 is a .* codes are all of length 1"):
        ResidualQuantizer([family(), family()])
    with pytest.raises(ValueError, match="put it into a Projected"):
        ResidualQuantizer([VQ(8, 4), family()])
    ResidualQuantizer([Projected(family(), 6), Projected(family(), 6)])
    kind = "cosine_vq" if isinstance(family(), CosineVQ) else "bsq"
    flags = f"--quantizer.kind {kind} --quantizer.width 4 --quantizer.codes 16"
    flags += " --quantizer.residual_levels 2"
    with pytest.raises(ConfigError, match=r"quantizer\.residual_levels 2 with quantizer\.kind"):
        check(with_flags(Config(), flags.split(), "train"))


def test_one_grid_for_two_levels_is_refused() -> None:
    for grid in (FSQ([4, 4]), LFQ(2)):
        with pytest.raises(ValueError, match="twice: make a new one for each"):
            ResidualQuantizer([grid, grid])
    with pytest.raises(ValueError, match="one or more levels"):
        ResidualQuantizer([])


def test_grids_of_levels_come_back_as_they_were_saved(tmp_path: Path) -> None:
    z = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    for quantizer in (
        ResidualQuantizer([FSQ([8, 5]), FSQ([8, 5])]),
        ResidualQuantizer([LFQ(2), LFQ(2)]),
    ):
        quantizer.save_pretrained(tmp_path)
        loaded = AnyQuantizer.from_pretrained(tmp_path)
        assert torch.equal(loaded(z).ids, quantizer(z).ids)
        assert torch.equal(loaded(z).z_q, quantizer(z).z_q)


@pytest.mark.parametrize("family", [ResidualQuantizer, GroupedQuantizer])
def test_one_codebook_in_several_places_comes_back_as_one(family: Any, tmp_path: Path) -> None:
    one, other = EMAVQ(8, 2), VQ(8, 2)
    family([family([one, other]), family([other, one])]).eval().save_pretrained(tmp_path)
    outer: Any = AnyQuantizer.from_pretrained(tmp_path)
    first, second = ([*inner] for inner in outer)
    assert first[0] is second[1]
    assert first[1] is second[0]
    assert torch.equal(first[0].decode(torch.arange(8)), one.codebook())
    for broken in ({"again": 7}, {"again": "0"}, {"again": 0}):
        spec = json.loads((tmp_path / "config.json").read_text())
        spec["arguments"][next(iter(spec["arguments"]))][1] = broken
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / "config.json").write_text(json.dumps(spec))
        (tmp_path / "broken" / "model.safetensors").write_bytes(
            (tmp_path / "model.safetensors").read_bytes()
        )
        with pytest.raises(ValueError, match="config"):
            AnyQuantizer.from_pretrained(tmp_path / "broken")


@pytest.mark.parametrize("family", [ResidualQuantizer, GroupedQuantizer])
def test_levels_and_heads_that_were_folded_come_back_folded(family: Any, tmp_path: Path) -> None:
    quantizer = family([SimVQ(8, 2), SimVQ(8, 2)]).eval()
    quantizer.parts[1] = quantizer.parts[1].fold()
    quantizer.save_pretrained(tmp_path)
    loaded: Any = AnyQuantizer.from_pretrained(tmp_path)
    z = torch.randn(20, quantizer.width)
    assert [type(part) for part in loaded.parts] == [SimVQ, VQ]
    assert torch.equal(loaded(z).z_q, quantizer(z).z_q)


@pytest.mark.parametrize("heads", [1, 3])
def test_ids_of_another_number_of_heads_are_refused(heads: int) -> None:
    grouped = GroupedQuantizer([FSQ([5]), LFQ(1)])
    with pytest.raises(ValueError, match=f"ids of {heads} heads, but there are 2"):
        grouped.decode(torch.zeros(4, heads, dtype=torch.int64))
