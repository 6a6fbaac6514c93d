"""From codes back to images and sound, by the tokenizer that they came from."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import soundfile
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from simvq_moe.config.flags import check_least
from simvq_moe.config.loading import ConfigError
from simvq_moe.data.code_items import Item, read_items, window_of
from simvq_moe.data.codes import CodeSequences, Manifest, open_codes, read_manifest
from simvq_moe.engine.devices import this_device
from simvq_moe.files.regular import written_whole
from simvq_moe.files.unfinished import check_free, filling
from simvq_moe.models.audio_tokenizer import AudioTokenizer
from simvq_moe.models.image_tokenizer import ImageTokenizer
from simvq_moe.runs.loading import fill, load_run, weights_sha256, without_networks
from simvq_moe.tasks.image_measures import as_bytes
from simvq_moe.tasks.models import build_model


class Decoder:
    """The tokenizer that a folder of token shards refers to.

    Args:
        folder: of the token shards.
        device: where the tokenizer runs.

    Raises:
        ConfigError: the tokenizer's run is gone, or has other weights than those that encoded.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.manifest: Manifest = read_manifest(folder)
        self.device = device
        run = tokenizer_run(folder)
        config, weights = load_run(run)
        if weights_sha256(weights) != self.manifest.tokenizer.weights_sha256:
            raise ConfigError(
                f"{run} has other weights than those that encoded {folder}: put them back, or "
                "encode again into a new folder"
            )
        self.batch_size = config.train.eval_batch_size
        model = fill(build_model(without_networks(config)), weights)
        assert isinstance(model, ImageTokenizer | AudioTokenizer)
        self.model = model.eval().to(device)

    @property
    def is_image(self) -> bool:
        return self.manifest.sample_rate == 0

    @torch.no_grad()
    def decode(
        self, sequences: Int64[Tensor, "samples window"]
    ) -> Float[Tensor, "samples axis *axes"]:
        """Images in (samples, 3, height, width) or clips in (samples, time), in [-1, 1] or near."""
        samples = self.model.decode(self.manifest.ids(sequences.to(self.device)))
        # the tokens of a clip cover a little more than it
        inside = tuple(slice(length) for length in self.manifest.sample_shape)
        return samples[(slice(None), *inside)]

    def write(self, sequences: Int64[Tensor, "samples window"], folder: Path, first: int) -> None:
        """One png or 16-bit wav each, numbered from `first` on."""
        for i, sample in enumerate(self.decode(sequences), start=first):
            self._save(self._values(sample[None])[0], folder / self.file_name(i))

    def write_whole(self, sequences: CodeSequences, first: int, item: Item, file: Path) -> None:
        """An image or a recording of its windows, the first of which is sequence `first`."""
        window = window_of(self.manifest)
        grid = item.grid(window)
        sides = [n * side for n, side in zip(grid, window, strict=True)]
        whole = np.zeros(
            (*sides, 3) if self.is_image else sides, np.uint8 if self.is_image else np.float32
        )
        places = np.stack(np.unravel_index(np.arange(prod(grid)), grid), axis=1) * window
        for start in range(0, len(places), self.batch_size):
            some = places[start : start + self.batch_size]
            samples = self.decode(sequences.batch(first + start + np.arange(len(some))))
            for place, values in zip(some, self._values(samples), strict=True):
                inside = tuple(slice(at, at + side) for at, side in zip(place, window, strict=True))
                whole[inside] = values
        self._save(whole[tuple(slice(size) for size in item.size)], file)

    def _values(self, samples: Float[Tensor, "samples axis *axes"]) -> np.ndarray:
        """Bytes of images, (samples, height, width, 3), or amplitudes of clips."""
        return pixels(samples) if self.is_image else samples.clamp(-1, 1).cpu().numpy()

    def _save(self, values: np.ndarray, file: Path) -> None:
        """A file that appears whole."""
        with written_whole(file) as aside:
            if self.is_image:
                Image.fromarray(values).save(aside)
            else:
                soundfile.write(aside, values, self.manifest.sample_rate)

    def file_name(self, number: int) -> str:
        """Of a sample."""
        return f"{number:06d}.{'png' if self.is_image else 'wav'}"


def tokenizer_run(folder: Path) -> Path:
    """The run whose codes these are.

    Raises:
        ConfigError: it is not where the manifest says.
    """
    run = (folder.resolve() / read_manifest(folder).tokenizer.run).resolve()
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} was encoded by the run {run}, which is gone: put it back there, or encode "
            "again into a new folder"
        )
    return run


def decode_folder(folder: Path, out: Path, limit: int | None) -> int:
    """Write the images or recordings of both parts, or the samples where these are crops, as
    out/train/000000.png ... or .wav; how many.

    Killed at any moment, the same call goes on with the files that are missing.

    Args:
        limit: of each part; None: all.

    Raises:
        ConfigError: the folder can't be decoded, `out` is not empty, or the limit is below 1.
    """
    if limit is not None:
        check_least(limit=(limit, 1))
    check_free(out)
    parts = open_codes(folder)
    decoder = Decoder(folder, this_device())
    items = read_items(folder, decoder.manifest) if decoder.manifest.whole else None
    made_of = {"codes": decoder.manifest.digest, "limit": limit}
    written = 0
    with filling(out, "decode", made_of):
        for part, sequences in parts.items():
            (out / part).mkdir(exist_ok=True)
            if items is None:
                written += _decode_samples(decoder, sequences, out / part, limit)
            else:
                written += _decode_items(decoder, sequences, items[part], out / part, limit)
    return written


def _decode_samples(
    decoder: Decoder, sequences: CodeSequences, out: Path, limit: int | None
) -> int:
    number = len(sequences) if limit is None else min(limit, len(sequences))
    for start in range(0, number, decoder.batch_size):
        indices = range(start, min(start + decoder.batch_size, number))
        if not all((out / decoder.file_name(i)).is_file() for i in indices):
            decoder.write(sequences.batch(np.array(indices)), out, start)
    return number


def _decode_items(
    decoder: Decoder,
    sequences: CodeSequences,
    items: Sequence[Item],
    out: Path,
    limit: int | None,
) -> int:
    first, window = 0, window_of(decoder.manifest)
    for i, item in enumerate(items[:limit]):
        if not (out / decoder.file_name(i)).is_file():
            decoder.write_whole(sequences, first, item, out / decoder.file_name(i))
        first += prod(item.grid(window))
    return len(items[:limit])


def check_empty(out: Path) -> None:
    """Raise `ConfigError` if there is something in the folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is not empty: give a new folder")


def pixels(
    images: Float[Tensor, "batch 3 height width"],
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Bytes of images in [-1, 1]."""
    return as_bytes(images).movedim(1, -1).cpu().numpy()


def sheet(
    *rows: Float[Tensor, "batch 3 height width"],
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """Images side by side, one row under the other."""
    return np.concatenate([np.concatenate(list(pixels(row)), axis=1) for row in rows])
