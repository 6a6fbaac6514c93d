"""Every rank writes an even part of a run's state, and all ranks together every element once."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.engine.pieces import Piece, own_share
from simvq_moe.tasks.registry import build_model
from tests.engine.fake_ranks import Part, Rank, parts_of_all

MODEL = (
    *("--task", "language_model", "--data.vocabulary", "2048", "--data.context", "16"),
    *("--language_model.width", "32", "--language_model.heads", "2"),
    *("--language_model.layers", "2", "--moe.experts", "64", "--moe.top_k", "2"),
    *("--moe.hidden", "32", "--train.batch_size", "64"),
)
ARMS = {
    "plain": (),
    "map after the experts": ("--moe.expert_out_map.kind", "linear"),
    "map of the router": ("--moe.router.map.kind", "linear"),
    "frozen experts": (
        *("--moe.expert_in_map.train_base", "False", "--moe.expert_out_map.train_base", "False"),
        *("--moe.expert_out_map.kind", "linear"),
    ),
}
PLAIN = "map after the experts"
LAYOUTS: list[tuple[int, int, int, tuple[int, ...], tuple[str, ...]]] = [
    (8, 1, 4, tuple(range(8)), (PLAIN,)),
    (8, 0, 1, (0, 7), (PLAIN,)),
    (64, 1, 1, (0, 37, 63), (PLAIN,)),
    (64, 3, 1, (0, 37, 63), (PLAIN,)),
    (64, 1, 8, (0, 63), tuple(ARMS)),
]
"""Ranks, ZeRO stage, ranks that share experts; ranks that are asked, and of which arms."""
ALLOWED = 1.3
"""Times its even part that a rank may write."""


def flags_of(arm: str, stage: int, expert_parallel: int) -> tuple[str, ...]:
    split = ("--moe.expert_parallel", str(expert_parallel))
    return (*MODEL, *ARMS[arm], "--train.zero_stage", str(stage), *split)


def whole_bytes(arm: str) -> int:
    """Of weights and of two moments of what is learned."""
    with torch.device("meta"):
        model = build_model(with_flags(Config(), flags_of(arm, 1, 1), "train"))
    tensors = model.state_dict(keep_vars=True).values()
    return sum(tensor.nbytes * (3 if tensor.requires_grad else 1) for tensor in tensors)


Written = dict[tuple[str, int, int, int], list[list[Part]]]


@pytest.fixture(scope="module")
def written() -> Written:
    """What ranks write, by arm, number of ranks, stage, and ranks that share experts."""
    cases = {
        (arm, ranks, stage, split): [
            Rank(rank, ranks, flags_of(arm, stage, split)) for rank in asked
        ]
        for ranks, stage, split, asked, arms in LAYOUTS
        for arm in arms
    }
    found = iter(parts_of_all([rank for ranks in cases.values() for rank in ranks]))
    return {case: [next(found).written for _ in ranks] for case, ranks in cases.items()}


def test_no_rank_of_8_or_64_writes_more_than_its_even_part(written: Written) -> None:
    for (arm, ranks, *layout), by_rank in written.items():
        even = whole_bytes(arm) / ranks
        for parts in by_rank:
            share = sum(part.bytes for part in parts) / even
            assert share <= ALLOWED, f"{arm}, {ranks}, {layout}: {share:.2f} times its part"


def test_8_ranks_write_every_element_once(written: Written) -> None:
    by_key: dict[str, list[Part]] = defaultdict(list)
    for parts in written[PLAIN, 8, 1, 4]:
        for part in parts:
            by_key[part.key].append(part)
    for key, found in by_key.items():
        at = 0
        for part in sorted(found, key=lambda part: part.start):
            assert part.start == at, key
            at += part.length
        assert at == torch.Size(found[0].shape).numel(), key


def alike(tensors: list[tuple[int, torch.dtype]], place: int, holders: int) -> list[Piece]:
    return [
        Piece(str(i), 5, torch.zeros(length, dtype=dtype), (length,), place, holders)
        for i, (length, dtype) in enumerate(tensors)
    ]


def test_little_is_written_by_few_so_that_nobody_opens_many_files_for_it() -> None:
    tensors = [(1000, torch.float32)] * 40  # 160 kB, twice what is not split and a bit
    shares = [own_share(alike(tensors, place, 64), least=2**16) for place in range(64)]
    assert [sum(len(piece.data) for piece in share) for share in shares[:3]] == [20_000, 20_000, 0]
    assert not any(shares[2:])


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from([torch.float32, torch.int64, torch.bool])),
        max_size=6,
    ),
    st.integers(1, 9),
)
def test_of_what_all_ranks_hold_each_writes_an_even_part(
    tensors: list[tuple[int, torch.dtype]], holders: int
) -> None:
    shares = [own_share(alike(tensors, place, holders), least=1) for place in range(holders)]
    total = sum(length * dtype.itemsize for length, dtype in tensors)
    for share in shares:
        assert abs(sum(piece.data.nbytes for piece in share) - total / holders) < 16
    for i, (length, _) in enumerate(tensors):
        found = sorted((p.start, len(p.data)) for share in shares for p in share if p.key == str(i))
        assert found
        starts, lengths = zip(*found, strict=True)
        assert [start - 5 for start in starts] == [sum(lengths[:k]) for k in range(len(lengths))]
        assert sum(lengths) == length
