"""A language model on the codes of a tokenizer: its data, held-out measures and new samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from simvq_moe.config.flags import check_least
from simvq_moe.config.loading import ConfigError
from simvq_moe.config.schema import Config, DataConfig
from simvq_moe.data.codes import Manifest, entropy_bits, is_codes, open_codes, read_manifest
from simvq_moe.engine.devices import this_device
from simvq_moe.engine.sharding import ready
from simvq_moe.files.unfinished import check_free, filling
from simvq_moe.inference.decode import Decoder, sheet, tokenizer_run
from simvq_moe.models.language_model import LanguageModel, NotFiniteError
from simvq_moe.runs.loading import fill, load_run, weights_sha256
from simvq_moe.tasks.models import build_model

NOT_FOR_CODES = ("document_mask", "streaming", "tokenizer")
"""Options of text that mean nothing to sequences that are a sample each."""
AT_A_TIME = 64
"""Samples that are drawn together."""
LEAST_TEMPERATURE = 1e-4
"""Below it scores over the temperature leave the range of float32."""


def is_of_codes(config: Config) -> bool:
    """Whether a config trains a language model on codes."""
    source = config.data.source
    return config.task == "language_model" and source is not None and is_codes(source)


def fit_to_codes(config: Config) -> Config:
    """The config with the vocabulary and the context of the codes that it trains on, if any.

    Raises:
        ConfigError: it says otherwise, or what was encoded, or the tokenizer, is not there.
    """
    if not is_of_codes(config):
        return config
    folder = Path(str(config.data.source))
    manifest = open_codes(folder)["train"].manifest
    tokenizer_run(folder)
    data = config.data
    for name in NOT_FOR_CODES:
        if getattr(data, name):
            raise ConfigError(
                f"data.{name} {getattr(data, name)!r} means nothing to the codes in data.source "
                f"{data.source!r}, of which each sequence is one sample: drop it"
            )
    for name, what in (("vocabulary", "the codes and the begin token"), ("context", "a sample")):
        value, needed = getattr(data, name), getattr(manifest, name)
        if value not in (needed, getattr(DataConfig(), name)):
            raise ConfigError(
                f"data.{name} {value} with the codes in data.source {data.source!r}: drop it, or "
                f"use {needed}, {what}"
            )
    return replace(
        config, data=replace(data, vocabulary=manifest.vocabulary, context=manifest.context)
    )


def check_same_codes(config: Config, source: str) -> None:
    """Make sure that ids mean in `source` what they meant in the data that a run was trained on.

    Args:
        config: of the run.

    Raises:
        ConfigError: one of the two is codes and the other is not, or another tokenizer encoded it.
    """
    trained_on, codes = config.data.source, is_codes(source)
    if config.task != "language_model" or not (codes or is_of_codes(config)):
        return
    if not is_of_codes(config):
        raise ConfigError(
            f"--data {source} holds codes, and data.source {trained_on!r}, which the run was "
            "trained on, does not, or is gone: give text, or put the codes back there"
        )
    if not codes:
        raise ConfigError(
            f"--data {source} holds no codes, which the run was trained on: give a folder that "
            "`simvq-moe encode` wrote with the same tokenizer"
        )
    ours, theirs = (read_manifest(Path(str(of))).tokenizer for of in (trained_on, source))
    if ours.weights_sha256 != theirs.weights_sha256:
        raise ConfigError(
            f"--data {source} was encoded by the tokenizer {theirs.weights_sha256[:12]}, and "
            f"data.source {trained_on!r}, which the run was trained on, by "
            f"{ours.weights_sha256[:12]}: encode the data with that one"
        )


def check_same_vocabulary(config: Config, manifest: Manifest) -> None:
    """Raise `ConfigError` where the codes of a run's data are no longer those that it learned."""
    for name in ("vocabulary", "context"):
        ours, theirs = getattr(config.data, name), getattr(manifest, name)
        if ours != theirs:
            raise ConfigError(
                f"data.{name} {ours} of the run is {theirs} in data.source {config.data.source!r}: "
                "put the codes back that the run was trained on"
            )


class CodesTask:
    """Model and data of a config, and what a run measures and shows of them.

    Args:
        config: of a language model whose data.source is a folder of token shards.

    Raises:
        ConfigError: see `open_codes` and `Decoder`.
    """

    def __init__(self, config: Config) -> None:
        folder = Path(str(config.data.source))
        parts = open_codes(folder)
        self.train, self.held_out = parts["train"], parts["held_out"]
        self.manifest, self.seed = self.train.manifest, config.seed
        self.unigram_bits = entropy_bits(self.held_out.counts())
        model = build_model(config)
        assert isinstance(model, LanguageModel)
        self.model = model
        self.decoder = Decoder(folder, this_device())

    def evaluate(self, batch: Tensor) -> dict[str, Tensor]:
        """Nats and codes of a held-out batch."""
        return token_sums(self.model, batch)

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        loss = sums["nats"] / sums["tokens"]
        return {
            "val/loss": loss,
            "val/bits_per_code": loss / math.log(2),
            "val/unigram_bits_per_code": self.unigram_bits,
        }

    def picture(self, batch: Tensor) -> np.ndarray:
        """Held-out images above new ones; all ranks call it together."""
        return sheet(self.decoder.decode(batch), self.decoder.decode(self._new(len(batch))))

    def sounds(self, batch: Tensor) -> dict[str, np.ndarray]:
        """Held-out clips and new ones; all ranks call it together."""
        pair = {"held_out": batch, "sample": self._new(len(batch))}
        return {
            name: self.decoder.decode(sequences).clamp(-1, 1).cpu().numpy()
            for name, sequences in pair.items()
        }

    def _new(self, samples: int) -> Tensor:
        """The same random numbers at every evaluation, so that only the model differs."""
        random = torch.Generator().manual_seed(self.seed)
        with ready(self.model):
            return draw_sequences(self.model, self.manifest, samples, generator=random)


def token_sums(model: LanguageModel, sequences: Int64[Tensor, "batch window"]) -> dict[str, Tensor]:
    """Nats of all tokens but the first of each sequence, and their number."""
    logits, _ = model.logits(sequences[:, :-1])
    targets = sequences[:, 1:].flatten()
    nats = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none").double().sum()
    return {"nats": nats, "tokens": torch.tensor(float(len(targets)))}


@dataclass(frozen=True)
class Drawing:
    """How new tokens are drawn: flags of `generate`.

    Raises:
        ConfigError: one is out of its range.
    """

    temperature: float
    top_k: int
    seed: int

    def __post_init__(self) -> None:
        check_least(temperature=(self.temperature, 0), top_k=(self.top_k, 0))
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ConfigError(
                f"--temperature {self.temperature} < {LEAST_TEMPERATURE}: use 0 for the best token"
            )
        check_seed(self.seed)

    def options(self) -> dict[str, Any]:
        """Of `LanguageModel.generate`, with a generator at the start of its numbers."""
        generator = torch.Generator().manual_seed(self.seed)
        return {"temperature": self.temperature, "top_k": self.top_k, "generator": generator}

    @contextmanager
    def of_finite_scores(self, run_dir: Path) -> Iterator[None]:
        """Name the run whose model has no scores to draw by."""
        try:
            yield
        except NotFiniteError as error:
            raise ConfigError(
                f"{run_dir}: {error}: the run has diverged, use another checkpoint or train again"
            ) from None


def check_seed(seed: int) -> None:
    """Raise `ConfigError` for a seed that torch doesn't take."""
    if not -(2**63) <= seed < 2**63:
        raise ConfigError(f"--seed {seed} has more than 64 bits: use 0 to {2**63 - 1}")


def draw_sequences(
    model: LanguageModel,
    manifest: Manifest,
    samples: int,
    *,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
) -> Int64[Tensor, "samples window"]:
    """New samples, code by code, each code from the range of its level."""
    device = model.embedding.weight.device
    return model.generate(
        torch.full((samples, 1), manifest.begin, device=device),
        manifest.context,
        temperature=temperature,
        top_k=top_k,
        ranges=manifest.ranges,
        generator=generator,
    )


def generate_samples(
    run_dir: Path, out: Path, samples: int, *, temperature: float, top_k: int, seed: int
) -> None:
    """Write new images or clips of a language model's run as out/000000.png ... or .wav.

    Raises:
        ConfigError: it is no run on codes, `out` is not empty, or a number is out of its range.
    """
    check_least(samples=(samples, 1))
    drawing = Drawing(temperature, top_k, seed)
    check_free(out)
    config, weights = load_run(run_dir)
    if not is_of_codes(config):
        raise ConfigError(
            f"--out {out}: {run_dir} is no language model on codes, or those in data.source "
            f"{config.data.source!r} are gone: drop --out for text"
        )
    folder = Path(str(config.data.source))
    decoder = Decoder(folder, this_device())
    model = fill(build_model(config), weights)
    assert isinstance(model, LanguageModel)
    check_same_vocabulary(config, decoder.manifest)
    model.to(decoder.device)
    options = drawing.options()
    made_of = {"weights": weights_sha256(weights), "codes": decoder.manifest.digest}
    made_of |= {"samples": samples, "temperature": temperature, "top_k": top_k, "seed": seed}
    with filling(out, "generate", made_of), drawing.of_finite_scores(run_dir):
        # all from the first on, for each batch's random numbers follow those of the one before
        for start in range(0, samples, AT_A_TIME):
            number = min(AT_A_TIME, samples - start)
            sequences = draw_sequences(model, decoder.manifest, number, **options)
            decoder.write(sequences, out, start)
