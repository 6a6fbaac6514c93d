"""From codes back to images and sound, by the tokenizer that they came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from simvq_moe.data.codes import Manifest, open_codes, read_manifest
from simvq_moe.merging import ConfigError
from simvq_moe.models.audio_tokenizer import AudioTokenizer
from simvq_moe.models.image_tokenizer import ImageTokenizer
from simvq_moe.training.building import build_model
from simvq_moe.training.devices import this_device
from simvq_moe.training.image_measures import as_bytes
from simvq_moe.training.loading import load_run, weights_sha256


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
        model = build_model(config)
        assert isinstance(model, ImageTokenizer | AudioTokenizer)
        model.load_state_dict(weights)
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
            if self.is_image:
                Image.fromarray(pixels(sample[None])[0]).save(folder / f"{i:06d}.png")
            else:
                clip = sample.clamp(-1, 1).cpu().numpy()
                soundfile.write(folder / f"{i:06d}.wav", clip, self.manifest.sample_rate)


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
    """Write the samples of both parts as out/train/000000.png ... or .wav; how many.

    Args:
        limit: samples of each part; None: all.

    Raises:
        ConfigError: the folder can't be decoded, `out` is not empty, or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} < 1: use at least 1, or drop it for all samples")
    check_empty(out)
    parts = open_codes(folder)
    decoder = Decoder(folder, this_device())
    written = 0
    for part, sequences in parts.items():
        (out / part).mkdir(parents=True)
        number = len(sequences) if limit is None else min(limit, len(sequences))
        for start in range(0, number, decoder.batch_size):
            indices = np.arange(start, min(start + decoder.batch_size, number))
            decoder.write(sequences.batch(indices), out / part, start)
        written += number
    return written


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
