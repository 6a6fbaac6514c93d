"""The way from codes back to images and sound, by the tokenizer that they came from."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from simvq_moe.config.schema import Config
from simvq_moe.data.code_items import Item, window_of
from simvq_moe.data.codes import MANIFEST, CodeSequences, Manifest, read_manifest
from simvq_moe.errors import ConfigError
from simvq_moe.files.of_runs import CONFIG
from simvq_moe.models.tokenizer import Tokenizer
from simvq_moe.tasks.loading import NOT_BUILT, load_run, model_of
from simvq_moe.tasks.samples import Samples
from simvq_moe.tasks.tokenizers import tokenizer_task


class Decoder:
    """The tokenizer that a folder of token shards refers to.

    Args:
        folder: of the token shards.
        device: where the tokenizer runs.

    Raises:
        ConfigError: the tokenizer's run is gone, has other weights than those that encoded, or
            makes no such samples as the manifest says.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.manifest: Manifest = read_manifest(folder)
        self.device = device
        run = tokenizer_run(folder)
        config, weights = load_run(run)
        if weights.digest() != self.manifest.tokenizer.weights_sha256:
            raise ConfigError(
                f"{run} has other weights than those that encoded {folder}: put them back, or "
                "encode again into a new folder"
            )
        self.batch_size = config.train.eval_batch_size
        self.task = tokenizer_task(config, run)
        model = model_of(config, weights).eval().to(device)
        assert isinstance(model, Tokenizer)
        self.model = model
        if not self._makes_its_samples(config):
            raise ConfigError(
                f"{folder / MANIFEST} says {self._samples()}, which {run} does not make: encode "
                "again into a new folder"
            )

    def _samples(self) -> str:
        of = self.manifest
        grid, shape = "x".join(map(str, of.grid)), "x".join(map(str, of.sample_shape))
        rate = f" at {of.sample_rate} Hz" if of.sample_rate else ""
        return f"{of.codes} codes in a grid of {grid} for samples of {shape}{rate}"

    @torch.no_grad()
    def _makes_its_samples(self, config: Config) -> bool:
        """Whether samples of the manifest's sizes come out of the tokenizer: the folder may be
        anybody's."""
        of = self.manifest
        if of.codes != config.quantizer.codes or of.sample_rate != self.task.sample_rate(config):
            return False
        if not any(of.samples.values()):  # no file bounds the grid, and nothing is decoded
            return True
        ids = torch.zeros((1, *of.grid, *of.row_shape[1:]), dtype=torch.int64, device=self.device)
        try:
            covered = self.model.decode(ids).shape[1:]
        except NOT_BUILT:
            return False
        sides = zip(of.sample_shape, covered, strict=False)
        return len(covered) == len(of.sample_shape) and all(side <= most for side, most in sides)

    @torch.no_grad()
    def decode(
        self, sequences: Int64[Tensor, "samples window"]
    ) -> Float[Tensor, "samples axis *axes"]:
        """Images in (samples, 3, height, width) or clips in (samples, time), in [-1, 1] or near."""
        samples = self.model.decode(self.manifest.ids(sequences.to(self.device)))
        # the tokens of a clip cover a little more than it
        inside = tuple(slice(length) for length in self.manifest.sample_shape)
        return samples[(slice(None), *inside)]

    def shown(self, sequences: Mapping[str, Int64[Tensor, "samples window"]]) -> Samples:
        """Decoded batches by name, beside or below each other."""
        decoded = {name: self.decode(codes) for name, codes in sequences.items()}
        return self.task.shown(decoded, sample_rate=self.manifest.sample_rate)

    def write(self, sequences: Int64[Tensor, "samples window"], folder: Path, first: int) -> None:
        """A file each, numbered from `first` on."""
        for i, sample in enumerate(self.decode(sequences), start=first):
            self._save(self.task.values(sample[None])[0], folder / self.file_name(i))

    def write_whole(self, sequences: CodeSequences, first: int, item: Item, file: Path) -> None:
        """An image or a recording of its windows, the first of which is sequence `first`."""
        window = window_of(self.manifest)
        grid = item.grid(window)
        sides = [n * side for n, side in zip(grid, window, strict=True)]
        whole = self.task.empty(sides)
        places = np.stack(np.unravel_index(np.arange(prod(grid)), grid), axis=1) * window
        for start in range(0, len(places), self.batch_size):
            some = places[start : start + self.batch_size]
            samples = self.decode(sequences.batch(first + start + np.arange(len(some))))
            for place, values in zip(some, self.task.values(samples), strict=True):
                inside = tuple(slice(at, at + side) for at, side in zip(place, window, strict=True))
                whole[inside] = values
        self._save(whole[tuple(slice(size) for size in item.size)], file)

    def _save(self, values: np.ndarray, file: Path) -> None:
        self.task.save(values, file, sample_rate=self.manifest.sample_rate)

    def file_name(self, number: int) -> str:
        """The name of a sample's file."""
        return f"{number:06d}.{self.task.suffix}"


def tokenizer_run(folder: Path) -> Path:
    """The run whose codes these are.

    Raises:
        ConfigError: it is not where the manifest says.
    """
    run = (folder.resolve() / read_manifest(folder).tokenizer.run).resolve()
    if not (run / CONFIG).is_file():
        raise ConfigError(
            f"{folder} was encoded by the run {run}, which is gone: put it back there, or encode "
            "again into a new folder"
        )
    return run
