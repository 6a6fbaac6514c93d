"""What is trained: a model, its two data sets and its held-out measures, from the config."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from simvq_moe.config.schema import Config
from simvq_moe.core.bank import effective_rank
from simvq_moe.data import audio, images, streaming, text
from simvq_moe.data.hashing import digest_of_both
from simvq_moe.data.sources import check_stream
from simvq_moe.data.streaming import TextStream
from simvq_moe.data.tokens import Corpus
from simvq_moe.engine.sharding import gathered
from simvq_moe.inference.decode import sheet
from simvq_moe.models.audio_tokenizer import AudioTokenizer
from simvq_moe.models.image_tokenizer import ImageTokenizer
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.moe.routers.build import start_from_data
from simvq_moe.quantizers import AnyQuantizer, Quantizer
from simvq_moe.tasks.audio_measures import AudioMeasures
from simvq_moe.tasks.codes import CodesTask, fit_to_codes, is_of_codes, token_sums
from simvq_moe.tasks.image_measures import ImageMeasures
from simvq_moe.tasks.models import build_model

EMBEDDED = {
    "image_tokenizer": "photos",
    "audio_tokenizer": "spoken-characters",
    "language_model": "python-stdlib",
}
TOKENIZER = "tokenizer.json"
"""Copy of the text tokenizer in a run's folder."""
SAMPLES = 8
"""Held-out samples that are shown."""
CONTINUED = 4
"""Held-out beginnings that are continued."""
BEGINNING, CONTINUATION = 32, 64
"""Tokens of a beginning, unless the context is shorter, and of its continuation."""
TEMPERATURE = 0.8
"""Of the continuations."""


@runtime_checkable
class DataSet(Protocol):
    """A fixed set of samples, read by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Any) -> Tensor: ...


@dataclass(frozen=True)
class Task:
    """A model with its data and measures; `model(batch)` returns the loss and its terms."""

    model: nn.Module
    train: DataSet | TextStream
    held_out: DataSet
    data_digest: str
    """Differs when the data of either side differ: a run goes on with those that it began with."""
    tokens_per_sample: int
    """Tokens (codes or text tokens) of one sample."""
    evaluate: Callable[[Tensor], dict[str, Tensor]]
    """Sums over a held-out batch, in float64, to be added over batches and ranks."""
    summarize: Callable[[Mapping[str, float]], dict[str, float]]
    """Held-out measures by name, from the summed sums."""
    start: Callable[[Tensor], None] | None
    """Start what starts from data from the first training batch, all ranks together."""
    picture: Callable[[Tensor], np.ndarray] | None
    """A held-out batch above what the model makes of it, (height, width, 3) uint8."""
    sounds: Callable[[Tensor], dict[str, np.ndarray]] | None = None
    """A held-out batch and what the model makes of it, by name, each (samples, time) in [-1, 1]."""
    sample_rate: int = 0
    """Hz of the sounds; 0: there are none."""
    tokenizer: Path | None = None
    """File of the text tokenizer."""
    continuations: Callable[[int], str] | None = None
    """Held-out beginnings and what the model makes of them at a step; all ranks call it together.
    """


def source_of(config: Config) -> str:
    """The data source, or the task's embedded set."""
    return config.data.source or EMBEDDED[config.task]


def check_source(config: Config) -> None:
    """Raise `ConfigError` for a source that does not exist or holds nothing readable."""
    if is_of_codes(config):
        fit_to_codes(config)
        return
    if config.data.streaming:
        for source in config.data.sources or (source_of(config),):
            check_stream(source)
        return
    reader = {"image_tokenizer": images, "audio_tokenizer": audio, "language_model": text}
    reader[config.task].check_source(source_of(config))
    if config.data.held_out_source is not None:
        images.check_source(config.data.held_out_source)


def build_task(
    config: Config, tokenizer: Path | None = None, measures: ImageMeasures | None = None
) -> Task:
    """Data and model of the config; the seed fixes the model's initial weights.

    Args:
        tokenizer: file of the text tokenizer; None: the one trained on the source.
        measures: of held-out images; None: those that need no network.
    """
    if config.task == "image_tokenizer":
        return _image_task(config, measures or ImageMeasures())
    if config.task == "audio_tokenizer":
        return _audio_task(config)
    if is_of_codes(config):
        return _codes_task(config)
    return _language_task(config, tokenizer)


def _image_task(config: Config, measures: ImageMeasures) -> Task:
    data = config.data
    train, held_out = images.image_crops(
        source_of(config),
        size=data.image_size,
        crops=data.crops,
        held_out_crops=data.held_out_crops,
        seed=data.seed,
        held_out_source=data.held_out_source,
        shorter_side=data.shorter_side,
        memory=data.decoded_megabytes * 2**20,
    )
    model = build_model(config)
    assert isinstance(model, ImageTokenizer)

    def evaluate(batch: Tensor) -> dict[str, Tensor]:
        # also where a rank has none left: others may wait for its part of the parameters
        reconstruction = model.reconstruct(batch)[0]
        return measures.to(batch.device).sums(batch, reconstruction)

    def summarize(sums: Mapping[str, float]) -> dict[str, float]:
        means = measures.means(sums)
        return {"val/loss": means["val/mse"], **means, **_rank_of_used_codes(model.quantizer)}

    def picture(batch: Tensor) -> np.ndarray:
        return sheet(batch, model.reconstruct(batch)[0])

    digest = digest_of_both(train.digest(), held_out.digest())
    side = data.image_size // 2**config.image_tokenizer.downsamplings
    return Task(
        *(model, train, held_out, digest, side**2, evaluate, summarize),
        start=model.initialize,
        picture=picture,
    )


def _audio_task(config: Config) -> Task:
    data = config.data
    length = round(data.audio_seconds * data.sample_rate)
    train, held_out = audio.audio_clips(
        source_of(config),
        sample_rate=data.sample_rate,
        length=length,
        clips=data.crops,
        held_out_clips=data.held_out_crops,
        seed=data.seed,
        memory=data.decoded_megabytes * 2**20,
    )
    model = build_model(config)
    assert isinstance(model, AudioTokenizer)
    measures = AudioMeasures(data.sample_rate)

    def evaluate(batch: Tensor) -> dict[str, Tensor]:
        # also where a rank has none left: others may wait for its part of the parameters
        reconstruction = model.reconstruct(batch)[0]
        return measures.to(batch.device).sums(batch, reconstruction)

    def summarize(sums: Mapping[str, float]) -> dict[str, float]:
        means = measures.means(sums)
        return {"val/loss": means["val/mel_distance"], **means} | _rank_of_used_codes(
            model.quantizer
        )

    digest = digest_of_both(train.digest(), held_out.digest())

    def sounds(batch: Tensor) -> dict[str, np.ndarray]:
        pair = {"original": batch, "reconstruction": model.reconstruct(batch)[0].clamp(-1, 1)}
        return {name: clips.cpu().numpy() for name, clips in pair.items()}

    return Task(
        *(model, train, held_out, digest, -(-length // model.hop), evaluate, summarize),
        start=model.initialize,
        picture=None,
        sounds=sounds,
        sample_rate=data.sample_rate,
    )


def _rank_of_used_codes(quantizer: AnyQuantizer) -> dict[str, float]:
    """Effective rank of the codes drawn in this window, each weighted by its draws."""
    if not isinstance(quantizer, Quantizer):
        return {}
    counts = quantizer.usage.double()
    weights = (counts / counts.sum())[:, None]
    with gathered(quantizer):
        codes = quantizer.codebook(torch.float64).detach()
    centred = (codes - (weights * codes).sum(0)) * weights.sqrt()
    return {"val/codes/effective_rank": float(effective_rank(torch.linalg.svdvals(centred)))}


def _codes_task(config: Config) -> Task:
    of = CodesTask(config)
    manifest = of.manifest
    return Task(
        *(of.model, of.train, of.held_out, manifest.digest, manifest.context),
        *(of.evaluate, of.summarize),
        start=partial(start_from_data, of.model) if config.moe.router_init == "data" else None,
        picture=of.picture if of.decoder.is_image else None,
        sounds=None if of.decoder.is_image else of.sounds,
        sample_rate=manifest.sample_rate,
    )


def _language_task(config: Config, tokenizer: Path | None) -> Task:
    data = config.data
    train, corpus = _text(config, tokenizer)
    model = build_model(config)
    assert isinstance(model, LanguageModel)
    if model.end_of_text is not None:
        model.end_of_text.fill_(corpus.end_of_text)

    def evaluate(batch: Tensor) -> dict[str, Tensor]:
        targets = batch[:, 1:]
        lengths = corpus.bytes_of_token.to(targets.device)[targets]
        return token_sums(model, batch) | {"bytes": lengths.sum().double()}

    def summarize(sums: Mapping[str, float]) -> dict[str, float]:
        return {
            "val/loss": sums["nats"] / sums["tokens"],
            "val/bits_per_byte": sums["nats"] / math.log(2) / sums["bytes"],
        }

    return Task(
        *(model, train, corpus.held_out, corpus.digest, data.context, evaluate, summarize),
        start=partial(start_from_data, model) if config.moe.router_init == "data" else None,
        picture=None,
        tokenizer=corpus.tokenizer,
        continuations=partial(_continuations, model, corpus, config.seed),
    )


def _text(config: Config, tokenizer: Path | None) -> tuple[DataSet | TextStream, Corpus]:
    """The training set, and the corpus that the held-out set and the tokenizer are of."""
    data = config.data
    common = {
        "vocabulary": data.vocabulary,
        "context": data.context,
        "cache_dir": data.cache_dir,
        "tokenizer": data.tokenizer if tokenizer is None else str(tokenizer),
        "on_corrupt": data.on_corrupt,
    }
    if not data.streaming:
        corpus = text.token_windows(source_of(config), **common)
        assert corpus.train is not None
        return corpus.train, corpus
    return streaming.text_stream(
        data.sources or (source_of(config),),
        weights=data.source_weights,
        held_out_share=data.held_out_share,
        held_out_documents=data.held_out_documents,
        shuffle_buffer=data.shuffle_buffer,
        seed=config.seed,
        **common,
    )


def _continuations(model: LanguageModel, corpus: Corpus, seed: int, step: int) -> str:
    """Random numbers are those of seed and step, and the generator of the training is not used."""
    shown = min(CONTINUED, len(corpus.held_out))
    windows = corpus.held_out.batch(np.arange(shown) * (len(corpus.held_out) // shown))
    beginnings = windows[:, : min(BEGINNING, model.context)].to(model.embedding.weight.device)
    random = torch.Generator().manual_seed(int(np.random.default_rng([seed, step]).integers(2**63)))
    whole = model.generate(beginnings, CONTINUATION, temperature=TEMPERATURE, generator=random)
    parts = [ids.cpu().tensor_split([beginnings.shape[1]]) for ids in whole]
    return "\n".join(
        f"=== beginning {i} ===\n{corpus.decode(first)}\n"
        f"=== continuation {i} ===\n{corpus.decode(rest)}\n"
        for i, (first, rest) in enumerate(parts, start=1)
    )
