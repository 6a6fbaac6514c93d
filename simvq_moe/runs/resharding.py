"""Ranks' pieces, written and read by torch.distributed.checkpoint, which finds out who needs what.

Its planners learn what a rank holds (`engine.pieces`), its storage is ours (`runs.chunks`). Plans
of all ranks meet on rank 0, which checks that every element is written once; on the way back each
rank reads the chunks that overlap with what it holds, of whatever ranks wrote them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from simvq_moe.engine.agreement import WriteFailed, writing
from simvq_moe.engine.pieces import Piece
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import write_atomically, written_whole
from simvq_moe.files.tensors import DTYPES, NAMES
from simvq_moe.runs.chunks import (
    INDEX,
    LARGEST_CHUNK,
    Chunk,
    ChunkReader,
    ChunkToWrite,
    Index,
    Stored,
    file_kind,
    write_chunks,
)

T = TypeVar("T")


def write_pieces(folder: Path, pieces: Sequence[Piece], world: World) -> dict[str, int]:
    """Write what this rank is to write of every tensor; names and sizes of its files.

    All ranks call it together; the index comes last, from rank 0.

    Raises:
        WriteFailed: on every rank, with what each that failed has to say.
    """
    writer, group = ChunkWriter(folder, world.rank), world.group
    planner = PieceSaver(pieces)
    _told(lambda: save({}, storage_writer=writer, planner=planner, process_group=group))
    return writer.sizes


def read_pieces(folder: Path, index: Index, pieces: Sequence[Piece]) -> None:
    """Read what this rank holds, into where it lies; all ranks call it together.

    Raises:
        ConfigError: on every rank, if a tensor is missing, or has another shape.
        BrokenFileError: on every rank, if one has read what was not written.
    """
    reader = IndexedReader(folder, index)
    _told(lambda: load({}, storage_reader=reader, planner=PieceLoader(pieces, folder)))


class PieceSaver(DefaultSavePlanner):
    """Plans to write pieces, in chunks of `LARGEST_CHUNK` elements at most."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces
        self.chunks: dict[MetadataIndex, Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        self.chunks = {
            MetadataIndex(piece.key, (piece.start + at,)): piece.data[at : at + LARGEST_CHUNK]
            for piece in self.pieces
            for at in range(0, max(len(piece.data), 1), LARGEST_CHUNK)
        }
        shapes = {piece.key: piece.shape for piece in self.pieces}
        items = [_to_write(index, data, shapes[index.fqn]) for index, data in self.chunks.items()]
        return SavePlan(items, planner_data=shapes)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        shapes = {key: shape for plan in all_plans for key, shape in plan.planner_data.items()}
        plans, metadata = super().create_global_plan(all_plans)
        plans = [dataclasses.replace(plan, planner_data=None) for plan in plans]
        return plans, dataclasses.replace(metadata, planner_data=shapes)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.chunks[index]


class PieceLoader(DefaultLoadPlanner):
    """Plans to read pieces from whatever chunks they were written in.

    Args:
        folder: named in errors.
    """

    def __init__(self, pieces: Sequence[Piece], folder: Path) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces, self.folder = {(p.key, p.start): p for p in pieces}, folder

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for piece in self.pieces.values():
            shape = self.metadata.planner_data.get(piece.key)
            if shape != piece.shape:
                lacks = f"lacks {piece.key}" if shape is None else f"has {piece.key} of {shape}"
                raise ConfigError(
                    f"checkpoint {self.folder} {lacks}: use the version that wrote it, or train "
                    "again with another --name"
                )
            wanted = ChunkStorageMetadata(torch.Size([piece.start]), piece.data.shape)
            found = self.metadata.state_dict_metadata[piece.key]
            assert isinstance(found, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(piece.key, found, [wanted])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.pieces[index.fqn, index.offset[0]].data


class ChunkWriter(StorageWriter):
    """Writes this rank's files, and on rank 0 the index of all."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.sizes: dict[str, int] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        del checkpoint_id

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        del is_coordinator, args, kwargs

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for kind in ("model", "optimizer"):
            items = [item for item in plan.items if file_kind(item.index.fqn) == kind]
            path = self.folder / f"{kind}_{self.rank}.safetensors"
            with writing(path):
                with written_whole(path) as aside:
                    chunks = write_chunks(aside, [_chunk(item, planner) for item in items])
                self.sizes[path.name] = path.stat().st_size
            for item, chunk in zip(items, chunks, strict=True):
                results.append(WriteResult(item.index, 0, chunk._replace(file=path.name)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[str, list[Chunk]] = {key: [] for key in metadata.state_dict_metadata}
        for of_rank in results:
            for result in of_rank:
                chunks[result.index.fqn].append(result.storage_data)
        tensors = {
            key: Stored(
                dtype=NAMES[known.properties.dtype],
                shape=metadata.planner_data[key],
                chunks=tuple(sorted(chunks[key])),
            )
            for key, known in metadata.state_dict_metadata.items()
            if isinstance(known, TensorStorageMetadata)
        }
        with writing(self.folder / INDEX):
            write_atomically(self.folder / INDEX, Index(tensors=tensors).model_dump_json())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        del checkpoint_id
        return True


class IndexedReader(StorageReader):
    """Reads each chunk once, however many pieces it overlaps with."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        del checkpoint_id

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs
        tensors = self.index.tensors
        return Metadata(
            {key: _metadata_of(stored) for key, stored in tensors.items()},
            planner_data={key: stored.shape for key, stored in tensors.items()},
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        del metadata, is_coordinator, args, kwargs

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_chunk: dict[tuple[Chunk, torch.dtype], list[ReadItem]] = {}
        for item in plan.items:
            stored, at = self.index.tensors[item.storage_index.fqn], item.storage_index.index
            assert at is not None
            by_chunk.setdefault((stored.chunks[at], DTYPES[stored.dtype]), []).append(item)
        with ChunkReader(self.folder) as reader:
            for chunk, dtype in sorted(by_chunk, key=lambda of: (of[0].file, of[0].offset)):
                reader.check_room(chunk, dtype)
                data = torch.empty(chunk.length, dtype=dtype)
                reader.read(chunk, data)
                for item in by_chunk[chunk, dtype]:
                    part = data.narrow(0, item.storage_offsets[0], item.lengths[0])
                    planner.resolve_tensor(item).copy_(part)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        del checkpoint_id
        return True


def _to_write(index: MetadataIndex, data: Tensor, shape: tuple[int, ...]) -> WriteItem:
    assert index.offset is not None
    of_data = TensorWriteData(
        chunk=ChunkStorageMetadata(index.offset, data.shape),
        properties=TensorProperties(dtype=data.dtype),
        size=torch.Size([torch.Size(shape).numel()]),
    )
    return WriteItem(index, WriteItemType.SHARD, tensor_data=of_data)


def _chunk(item: WriteItem, planner: SavePlanner) -> ChunkToWrite:
    assert item.tensor_data is not None
    of_data, key = item.tensor_data, item.index.fqn

    def data() -> Tensor:
        found = planner.resolve_data(item)
        assert isinstance(found, Tensor)
        return found

    start, length = of_data.chunk.offsets[0], of_data.chunk.sizes[0]
    return ChunkToWrite(key, start, length, of_data.properties.dtype, data)


def _metadata_of(stored: Stored) -> TensorStorageMetadata:
    chunks = [
        ChunkStorageMetadata(torch.Size([chunk.start]), torch.Size([chunk.length]))
        for chunk in stored.chunks
    ]
    properties = TensorProperties(dtype=DTYPES[stored.dtype])
    return TensorStorageMetadata(properties, torch.Size([stored.elements]), chunks)


def _told(work: Callable[[], T]) -> T:
    """What work returns; in place of its own exception, what the ranks that failed have raised."""
    try:
        return work()
    except CheckpointException as failure:
        errors = {rank: error for rank, (error, _) in sorted(failure.failures.items())}
        unwritten = {r: str(e) for r, e in errors.items() if isinstance(e, WriteFailed)}
        if len(unwritten) == len(errors):
            alone = torch.distributed.get_world_size() == 1
            said = [text if alone else f"rank {r}: {text}" for r, text in unwritten.items()]
            raise WriteFailed("; ".join(said)) from failure
        raise next(e for r, e in errors.items() if r not in unwritten) from failure
