"""Language models on the codes of a tokenizer: bits per code, and new samples of its kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from simvq_moe.config.schema import Config, DataConfig
from simvq_moe.data.codes import Manifest, entropy_bits, is_codes, open_codes, read_manifest
from simvq_moe.engine.devices import this_device
from simvq_moe.engine.sharding import ready
from simvq_moe.errors import ConfigError
from simvq_moe.files.unfinished import filling
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.tasks.decoder import Decoder, tokenizer_run
from simvq_moe.tasks.drawing import Drawing, DrawnFrom
from simvq_moe.tasks.loading import model_of
from simvq_moe.tasks.registry import register
from simvq_moe.tasks.samples import SHOWN, Samples, evenly_spread
from simvq_moe.tasks.sequences import SequenceTask

TEMPERATURE = 1.0
"""The temperature at which new samples are drawn, unless `generate` is told another."""
SAMPLES_AT_A_TIME = 64
"""New samples that are drawn together."""
NOT_FOR_CODES = ("document_mask", "streaming", "tokenizer")
"""Options of text that mean nothing to sequences that are a sample each."""


@register
class CodesTask(SequenceTask):
    """A language model on a folder of token shards, of which each sequence is one sample.

    Args:
        config: names the folder as its data.source.

    Raises:
        ConfigError: see `open_codes` and `Decoder`.
    """

    def __init__(self, config: Config) -> None:
        folder = codes_of(config)
        parts = open_codes(folder)
        self.manifest = parts["train"].manifest
        self.unigram_bits = entropy_bits(parts["held_out"].counts())
        super().__init__(
            config=config,
            model=self.build_model(config),
            train=parts["train"],
            held_out=parts["held_out"],
            data_digest=self.manifest.digest,
        )
        self.decoder = Decoder(folder, this_device())

    @classmethod
    def takes(cls, config: Config) -> bool:
        source = config.data.source
        return super().takes(config) and source is not None and is_codes(source)

    @classmethod
    def fit_to_data(cls, config: Config) -> Config:
        """The config with the vocabulary and the context of the codes.

        Raises:
            ConfigError: it says otherwise, or what was encoded, or the tokenizer, is not there.
        """
        folder = codes_of(config)
        manifest = open_codes(folder)["train"].manifest
        tokenizer_run(folder)
        data = config.data
        for name in NOT_FOR_CODES:
            if getattr(data, name):
                raise ConfigError(
                    f"data.{name} {getattr(data, name)!r} means nothing to the codes in "
                    f"data.source {data.source!r}, of which each sequence is one sample: drop it"
                )
        what = {"vocabulary": "the codes and the begin token", "context": "a sample"}
        for name, counted in what.items():
            value, needed = getattr(data, name), getattr(manifest, name)
            if value not in (needed, getattr(DataConfig(), name)):
                raise ConfigError(
                    f"data.{name} {value} with the codes in data.source {data.source!r}: drop it, "
                    f"or use {needed}, {counted}"
                )
        return replace(
            config, data=replace(data, vocabulary=manifest.vocabulary, context=manifest.context)
        )

    @classmethod
    def check_files(cls, config: Config) -> None:
        cls.fit_to_data(config)

    @classmethod
    def check_same_meaning(cls, config: Config, source: str) -> None:
        if not is_codes(source):
            raise ConfigError(
                f"--data {source} holds no codes, which the run was trained on: give a folder that "
                "`simvq-moe encode` wrote with the same tokenizer"
            )
        trained_on = codes_of(config)
        ours, theirs = (read_manifest(folder).tokenizer for folder in (trained_on, Path(source)))
        if ours.weights_sha256 != theirs.weights_sha256:
            raise ConfigError(
                f"--data {source} was encoded by the tokenizer {theirs.weights_sha256[:12]}, and "
                f"data.source {config.data.source!r}, which the run was trained on, by "
                f"{ours.weights_sha256[:12]}: encode the data with that one"
            )

    @classmethod
    def write_new_samples(cls, run: DrawnFrom, out: Path, samples: int, drawing: Drawing) -> None:
        decoder = Decoder(codes_of(run.config), this_device())
        manifest, model = decoder.manifest, model_of(run.config, run.weights)
        assert isinstance(model, LanguageModel)
        check_same_vocabulary(run.config, manifest)
        model.to(decoder.device)
        options = drawing.options(TEMPERATURE)
        made_of = {"weights": run.weights.digest(), "codes": manifest.digest, "samples": samples}
        made_of |= {"temperature": options["temperature"]}
        made_of |= {"top_k": drawing.top_k, "seed": drawing.seed}
        with filling(out, "generate", made_of):
            # all from the first on, because a batch's random numbers follow those of the one before
            for start in range(0, samples, SAMPLES_AT_A_TIME):
                number = min(SAMPLES_AT_A_TIME, samples - start)
                sequences = draw_sequences(model, manifest, number, **options)
                decoder.write(sequences, out, start)

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        loss = sums["nats"] / sums["tokens"]
        return {
            "val/loss": loss,
            "val/bits_per_code": loss / math.log(2),
            "val/unigram_bits_per_code": self.unigram_bits,
        }

    @torch.no_grad()
    def samples(self, step: int, device: torch.device) -> Samples:
        """Held-out samples and new ones, drawn by the same random numbers at every evaluation, so
        that only the model differs."""
        del step
        self.model.eval()
        held_out = self.held_out.batch(evenly_spread(len(self.held_out), SHOWN)).to(device)
        random = torch.Generator().manual_seed(self.config.seed)
        with ready(self.model):
            new = draw_sequences(self.model, self.manifest, len(held_out), generator=random)
        return self.decoder.shown({"held_out": held_out, "sample": new})


def codes_of(config: Config) -> Path:
    """The folder of token shards that a config names."""
    return Path(str(config.data.source))


def draw_sequences(
    model: LanguageModel,
    manifest: Manifest,
    samples: int,
    *,
    generator: torch.Generator,
    temperature: float = TEMPERATURE,
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


def check_same_vocabulary(config: Config, manifest: Manifest) -> None:
    """Raise `ConfigError` where the codes of a run's data are no longer those that it learned."""
    for name in ("vocabulary", "context"):
        ours, theirs = getattr(config.data, name), getattr(manifest, name)
        if ours != theirs:
            raise ConfigError(
                f"data.{name} {ours} of the run is {theirs} in data.source {config.data.source!r}: "
                "put the codes back that the run was trained on"
            )
