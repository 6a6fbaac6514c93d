"""Pieces of any ranks are written once and read by any others, to the bit, and no more of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.testing import assert_close

from simvq_moe.engine.pieces import Piece
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import BrokenFileError, validate_json
from simvq_moe.runs import resharding
from simvq_moe.runs.chunks import INDEX, ChunkReader, Index, read_whole
from simvq_moe.runs.resharding import ChunkWriter, IndexedReader, PieceLoader, PieceSaver
from tests.engine.fake_ranks import Part, Parts, Rank, parts_of_all

TENSORS = {
    "a": torch.randn(6, 7),
    "b": torch.tensor(True),
    "c": torch.zeros(0, 3, dtype=torch.int64),
    "exp_avg/a": torch.randn(6, 7).to(torch.bfloat16),
}


def pieces_of(tensors: dict[str, Tensor], rank: int, ranks: int) -> list[Piece]:
    """An even part of each tensor, of which the last ranks may hold nothing."""
    found = []
    for key, tensor in tensors.items():
        flat = tensor.reshape(-1)
        size = -(-len(flat) // ranks)
        data = flat[rank * size : (rank + 1) * size]
        if len(data) or (not len(flat) and not rank):
            found.append(Piece(key, rank * size, data, tuple(tensor.shape)))
    return found


def write(folder: Path, ranks: int) -> Index:
    return write_all(folder, [pieces_of(TENSORS, rank, ranks) for rank in range(ranks)])


def write_all(folder: Path, by_rank: Sequence[list[Piece]]) -> Index:
    """What `write_pieces` does on all ranks, on one after the other."""
    folder.mkdir(exist_ok=True)
    planners = [PieceSaver(pieces) for pieces in by_rank]
    for planner in planners:
        planner.set_up_planner({}, is_coordinator=True)
    plans, metadata = planners[0].create_global_plan([p.create_local_plan() for p in planners])
    writers = [ChunkWriter(folder, rank) for rank in range(len(by_rank))]
    results = [
        writer.write_data(planner.finish_plan(plan), planner).wait()
        for writer, planner, plan in zip(writers, planners, plans, strict=True)
    ]
    writers[0].finish(metadata, results)
    return validate_json((folder / INDEX).read_bytes(), Index, INDEX)


def read(folder: Path, index: Index, pieces: list[Piece]) -> None:
    planner, reader = PieceLoader(pieces, folder), IndexedReader(folder, index)
    planner.set_up_planner({}, reader.read_metadata())
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()


MODEL = (
    *("--task", "language_model", "--data.vocabulary", "64", "--data.context", "8"),
    *("--language_model.width", "12", "--language_model.heads", "2"),
    *("--language_model.layers", "1", "--moe.experts", "4", "--moe.top_k", "2"),
    *("--moe.hidden", "6", "--moe.expert_out_map.kind", "linear", "--train.batch_size", "8"),
)
LAYOUTS = {(1, 1, 1), (2, 1, 1), (2, 1, 2), (4, 1, 2), (4, 3, 1), (4, 0, 1), (2, 3, 1)}
"""Number of ranks, ZeRO stage, ranks that share experts."""


@pytest.fixture(scope="module")
def engines() -> dict[tuple[int, int, int], list[Parts]]:
    """What all ranks of engines of every layout write and hold."""
    asked = {
        (ranks, stage, split): [
            Rank(
                rank,
                ranks,
                (*MODEL, "--train.zero_stage", f"{stage}", "--moe.expert_parallel", f"{split}"),
            )
            for rank in range(ranks)
        ]
        for ranks, stage, split in sorted(LAYOUTS)
    }
    found = iter(parts_of_all([rank for ranks in asked.values() for rank in ranks]))
    return {layout: [next(found) for _ in ranks] for layout, ranks in asked.items()}


def filled(parts: Sequence[Part], *, known: bool) -> list[Piece]:
    """Pieces whose elements say whose they are, or nothing."""
    pieces = []
    for part in parts:
        data = torch.full((part.length,), -1.0)
        if known:
            data = torch.arange(part.start, part.start + part.length).float() + len(part.key)
        pieces.append(Piece(part.key, part.start, data.to(part.dtype), part.shape))
    return pieces


@pytest.mark.usefixtures("large_chunks")
def test_ranks_of_any_layout_read_what_those_of_any_other_have_written(
    tmp_path: Path, engines: dict[tuple[int, int, int], list[Parts]]
) -> None:
    for i, writers in enumerate(engines.values()):
        folder = tmp_path / str(i)
        index = write_all(folder, [filled(parts.written, known=True) for parts in writers])
        for readers in engines.values():
            for parts in readers:
                pieces = filled(parts.held, known=False)
                read(folder, index, pieces)
                for piece, expected in zip(pieces, filled(parts.held, known=True), strict=True):
                    assert_close(piece.data, expected.data, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resharding, "LARGEST_CHUNK", 5)


@pytest.fixture
def large_chunks(small_chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    del small_chunks
    monkeypatch.setattr(resharding, "LARGEST_CHUNK", 300)


@pytest.mark.parametrize("before", [1, 2, 5, 64])
@pytest.mark.parametrize("after", [1, 3, 8])
def test_what_some_ranks_write_others_read_to_the_bit(
    tmp_path: Path, before: int, after: int
) -> None:
    index = write(tmp_path, before)
    found = {key: torch.full_like(tensor, 2) for key, tensor in TENSORS.items()}
    for rank in range(after):
        read(tmp_path, index, pieces_of(found, rank, after))
    assert_close(found, TENSORS, rtol=0, atol=0)
    assert_close(dict(read_whole(tmp_path, index.tensors)), TENSORS, rtol=0, atol=0)
    assert index.weights().keys() == {"a", "b", "c"}


def test_a_rank_reads_each_chunk_that_it_needs_once_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = write(tmp_path, 4)
    read_chunks: list[Any] = []
    real = ChunkReader.read

    def counted(self: ChunkReader, chunk: Any, into: Tensor) -> None:
        read_chunks.append(chunk)
        real(self, chunk, into)

    monkeypatch.setattr(ChunkReader, "read", counted)
    # the same ranks: a rank opens its own files alone
    read(tmp_path, index, pieces_of(TENSORS, 2, 4))
    assert {chunk.file for chunk in read_chunks} == {
        "model_2.safetensors",
        "optimizer_2.safetensors",
    }
    assert len(set(read_chunks)) == len(read_chunks)
    # elements 14 to 20 of 42: of chunks [11, 16), [16, 21) and [21, 22)
    read_chunks.clear()
    read(tmp_path, index, [Piece("a", 14, torch.empty(7), (6, 7))])
    assert sorted(chunk.start for chunk in read_chunks) == [11, 16]


def test_a_file_of_chunks_is_one_of_safetensors(tmp_path: Path) -> None:
    write(tmp_path, 2)
    with safe_open(tmp_path / "model_0.safetensors", "pt") as file:
        assert_close(file.get_tensor("a@5"), TENSORS["a"].view(-1)[5:10], rtol=0, atol=0)
    with safe_open(tmp_path / "optimizer_1.safetensors", "pt") as file:
        assert file.get_tensor("exp_avg/a@21").dtype == torch.bfloat16


def test_other_content_is_seen_by_whoever_reads_it(tmp_path: Path) -> None:
    index = write(tmp_path, 2)
    path = tmp_path / "model_1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    read(tmp_path, index, pieces_of(TENSORS, 0, 2))
    with pytest.raises(BrokenFileError, match=r"model_1.safetensors has another content"):
        read(tmp_path, index, pieces_of(TENSORS, 1, 2))
    path.write_bytes(content[:-4])
    with pytest.raises(BrokenFileError, match=r"model_1.safetensors is shorter"):
        list(read_whole(tmp_path, index.weights()))


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    index = write(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"has a of \(6, 7\): use the version that wrote it"):
        read(tmp_path, index, [Piece("a", 0, torch.empty(42), (7, 6))])
    with pytest.raises(ConfigError, match=r"lacks d: use the version that wrote it"):
        read(tmp_path, index, [Piece("d", 0, torch.empty(42), (7, 6))])


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("shape",), [2**50], "chunks have 42 of"),
        (("dtype",), "F7", "is none of"),
        (("chunks", 0, 0), 1, "leave out or repeat element 0"),
        (("chunks", 0, 1), 43, "leave out or repeat element 5"),
        (("chunks", 0, 2), "../model_0.safetensors", "pattern"),
        (("chunks", 0, 3), -1, "greater than or equal to 0"),
    ],
)
def test_an_index_that_can_not_be_true_is_refused(
    tmp_path: Path, place: tuple[Any, ...], value: Any, words: str
) -> None:
    write(tmp_path, 1)
    content = json.loads((tmp_path / INDEX).read_text())
    *way, last = ("tensors", "a", *place)
    inner = content
    for key in way:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(BrokenFileError, match=words):
        validate_json(json.dumps(content), Index, INDEX)


def test_an_index_of_more_than_is_there_takes_no_memory(tmp_path: Path) -> None:
    index = write(tmp_path, 1)
    stored = index.tensors["a"]
    more = stored.chunks[0]._replace(length=2**50)
    huge = stored.model_copy(update={"shape": (2**50,), "chunks": (more,)})
    with pytest.raises(BrokenFileError, match="is shorter than when it was written"):
        list(read_whole(tmp_path, {"a": huge}))
    with pytest.raises(BrokenFileError, match="is shorter than when it was written"):
        read(tmp_path, Index(tensors={"a": huge}), [Piece("a", 0, torch.empty(1), (2**50,))])
