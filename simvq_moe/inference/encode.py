"""A data set as token shards: the codes that a tokenizer's run gives its images or recordings.

Samples are windows of the size that the tokenizer was trained on. They cover every image and every
recording once, or are the crops that the run was trained on.

Shards are dealt out to ranks in turn and encoded in batches that do not depend on that, so that any
number of ranks writes the same bytes. A finished shard is never encoded again.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from simvq_moe.config.checks_values import check_text
from simvq_moe.config.loading import first_difference
from simvq_moe.data.code_items import Item, write_items
from simvq_moe.data.codes import (
    MANIFEST,
    PARTS,
    Manifest,
    Rows,
    Shard,
    TokenizerReference,
    is_codes,
    read_manifest,
    seal,
    write_manifest,
    write_shard,
)
from simvq_moe.engine.devices import this_device
from simvq_moe.engine.launched import check_launched, launched_ranks
from simvq_moe.engine.slurm import adopt_slurm
from simvq_moe.engine.world import World, start_distributed
from simvq_moe.errors import ConfigError
from simvq_moe.files.unfinished import ASIDE, filled_alone
from simvq_moe.inference.evaluate import with_source
from simvq_moe.models.tokenizer import Tokenizer
from simvq_moe.records.progress import SECONDS_BETWEEN_LINES, duration
from simvq_moe.tasks.base import DataSet
from simvq_moe.tasks.loading import load_run, model_of
from simvq_moe.tasks.tokenizers import tokenizer_task


def encode_run(
    run_dir: Path, source: str | None, out: Path, shard_samples: int, *, whole: bool = False
) -> Manifest:
    """Encode both parts of a run's data, or of another source, into a folder; all ranks together.

    Args:
        source: has held-out images or recordings of its own; None: the run's data.
        whole: whole images and recordings, in windows; else the crops that the run's config draws.

    Raises:
        ConfigError: it is no tokenizer's run, or the folder holds something else.
    """
    adopt_slurm(os.environ)
    check_launched(os.environ)
    config, weights = load_run(run_dir)
    task = tokenizer_task(config, run_dir)
    config = task.without_networks(config)
    if source is not None:
        config = with_source(config, source)
    task.check_files(config)
    _check_folder(out)
    run = os.path.relpath(run_dir.resolve(), out.resolve())
    check_text("path of the run, which the manifest says,", run)
    world = start_distributed() if launched_ranks() > 1 else World(0, 1, this_device())
    data = world.main_first(lambda: task.windows(config) if whole else task.crops(config))
    parts = {"train": data.train, "held_out": data.held_out}
    encoder = Encoder(model_of(config, weights), parts, config.train.eval_batch_size, world.device)
    items = data.items and {"train": data.items[0], "held_out": data.items[1]}
    reference = TokenizerReference(
        run=run,
        weights_sha256=weights.digest(),
        config=asdict(config),
    )
    wanted = Manifest(
        tokenizer=reference,
        source=task.source(config),
        data_digest=data.digest,
        codes=config.quantizer.codes,
        sample_rate=task.sample_rate(config),
        samples={part: len(encoder.parts[part]) for part in PARTS},
        shard_samples=shard_samples,
        whole=whole,
        **encoder.shapes(),
    )
    with ExitStack() as held:
        world.agree(lambda: _hold(out, held) if world.is_main else None)
        found = _encode(encoder, wanted, items, out, world)
    if world.size > 1:
        dist.destroy_process_group()
    return found


def _hold(out: Path, held: ExitStack) -> None:
    """Keep other processes from filling the folder."""
    out.mkdir(parents=True, exist_ok=True)
    held.enter_context(filled_alone(out))


class Encoder:
    """A tokenizer and the two data sets that it encodes.

    Args:
        model: the tokenizer, with its weights.
        parts: the data sets.
        batch_size: samples encoded at a time, from the first of a shard on.
        device: where the tokenizer runs.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: dict[str, DataSet],
        batch_size: int,
        device: torch.device,
    ) -> None:
        assert isinstance(model, Tokenizer)
        self.model = model.eval().to(device)
        self.parts = parts
        self.batch_size, self.device = batch_size, device

    @torch.no_grad()
    def shapes(self) -> dict[str, Any]:
        """Fields of the manifest that a sample tells."""
        sample = self.parts["train"].batch(np.arange(1)).to(self.device)
        shape = self.model.encode(sample).shape[1:]
        axes = len(shape) - self.model.quantizer.id_axes
        levels = int(np.prod(shape[axes:]))
        return {
            "grid": tuple(shape[:axes]),
            "levels": levels,
            "sample_shape": tuple(sample.shape[1:]),
        }

    @torch.no_grad()
    def encode(self, part: str, first: int, end: int, manifest: Manifest) -> Iterator[Rows]:
        """Codes of the samples from first to end, a batch at a time."""
        for start in range(first, end, self.batch_size):
            indices = np.arange(start, min(start + self.batch_size, end))
            ids = self.model.encode(self.parts[part].batch(indices).to(self.device))
            rows = ids.reshape(len(indices), *manifest.row_shape)
            yield rows.cpu().numpy().astype(manifest.dtype)


@dataclass(frozen=True)
class _Piece:
    """A shard that is to be."""

    part: str
    file: str
    first: int
    end: int


def _pieces(manifest: Manifest) -> list[_Piece]:
    return [
        _Piece(part, f"{part}_{i:05d}.npy", first, min(first + manifest.shard_samples, samples))
        for part, samples in manifest.samples.items()
        for i, first in enumerate(range(0, samples, manifest.shard_samples))
    ]


def _encode(
    encoder: Encoder,
    wanted: Manifest,
    items: dict[str, list[Item]] | None,
    out: Path,
    world: World,
) -> Manifest:
    """Write what is missing, then the manifest with every shard's hash."""
    before = _take_up(out, wanted, world)
    if items is not None and world.is_main:
        write_items(out, items)
    mine = _pieces(wanted)[world.rank :: world.size]
    sealed = {shard.file: shard for shards in before.shards.values() for shard in shards}
    finished = {piece.file: _finished(out, piece, sealed) for piece in mine}
    missing = [piece for piece in mine if finished[piece.file] is None]
    progress = _Progress(sum(piece.end - piece.first for piece in missing), shown=world.is_main)
    for piece in missing:
        rows = []
        for batch in encoder.encode(piece.part, piece.first, piece.end, wanted):
            rows.append(batch)
            progress.add(len(batch))
        write_shard(out / piece.file, np.concatenate(rows))
        finished[piece.file] = seal(out / piece.file)
    shards: dict[str, Any] = {}
    for of_rank in world.gather(finished):
        shards |= of_rank
    ordered = {
        part: tuple(shards[piece.file] for piece in _pieces(wanted) if piece.part == part)
        for part in PARTS
    }
    complete = replace(wanted, shards=ordered)
    if world.is_main:
        write_manifest(out, complete)
        for path in out.iterdir():
            if _is_left_over(path):
                path.unlink(missing_ok=True)
    world.barrier()
    return complete


def _take_up(out: Path, wanted: Manifest, world: World) -> Manifest:
    """The folder's manifest of the same inputs, which rank 0 writes if there is none."""
    before = read_manifest(out) if (out / MANIFEST).is_file() else None
    if before is not None:
        difference = first_difference(_inputs(before), _inputs(wanted))
        if difference:
            raise ConfigError(
                f"--out {out} holds other codes ({difference}): give a new folder, or remove it"
            )
    # nobody writes until all have looked
    world.barrier()
    if before is None and world.is_main:
        write_manifest(out, wanted)
    world.barrier()
    return before or wanted


def _inputs(manifest: Manifest) -> Manifest:
    """What decides the bytes of shards and where the tokenizer is found."""
    return replace(manifest, shards={}, tokenizer=replace(manifest.tokenizer, config={}))


def _finished(out: Path, piece: _Piece, sealed: dict[str, Shard]) -> Shard | None:
    """The shard if it is there, as it was when it was written."""
    found = seal(out / piece.file)
    if found is None or found.samples != piece.end - piece.first:
        return None
    if piece.file in sealed and found != sealed[piece.file]:
        print(f"{out / piece.file} is damaged and is encoded again", file=sys.stderr)
        return None
    return found


def _check_folder(out: Path) -> None:
    """Raise `ConfigError` for a folder that is none of ours; one in which nothing is left but what
    was about to be written is."""
    if not out.exists() or is_codes(out):
        return
    if not out.is_dir() or any(not _is_left_over(path) for path in out.iterdir()):
        raise ConfigError(f"--out {out} holds something else than codes: give a new folder")


def _is_left_over(path: Path) -> bool:
    """Whether a killed process was writing this file, of which nothing is known to be whole."""
    return path.name.startswith(ASIDE) or path.name == f"{MANIFEST}.tmp"


class _Progress:
    """One line on standard error: samples of this rank, their rate, and the time left."""

    def __init__(self, samples: int, *, shown: bool) -> None:
        self.samples, self.shown = samples, shown
        self.done, self.began, self.printed = 0, time.monotonic(), float("-inf")

    def add(self, samples: int) -> None:
        self.done += samples
        now = time.monotonic()
        last = self.done == self.samples
        if not self.shown or (now - self.printed < SECONDS_BETWEEN_LINES and not last):
            return
        self.printed = now
        rate = self.done / max(now - self.began, 1e-9)
        left = duration((self.samples - self.done) / rate)
        share = f"{100 * self.done / self.samples:.0f}%"
        line = f"encode {self.done:,}/{self.samples:,} samples  {share}  {rate:,.0f} samples/s"
        print(f"{line}  ETA {left}", file=sys.stderr, flush=True)
