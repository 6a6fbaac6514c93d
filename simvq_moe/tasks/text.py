"""Language models on text: windows of its tokens, bits per byte, and continuations to read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from simvq_moe.config.schema import Config
from simvq_moe.data.codes import is_codes
from simvq_moe.data.text import corpora, streaming
from simvq_moe.data.text.sources import check_stream
from simvq_moe.data.text.streaming import TextStream
from simvq_moe.data.text.tokenizer import (
    TOKENIZER_FILE,
    encode_text,
    end_of_text,
    load_tokenizer,
)
from simvq_moe.data.text.tokens import Corpus
from simvq_moe.engine.sharding import ready
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import read_bytes
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.tasks.base import DataSet
from simvq_moe.tasks.drawing import Drawing, DrawnFrom
from simvq_moe.tasks.loading import model_of
from simvq_moe.tasks.registry import register
from simvq_moe.tasks.samples import Samples, evenly_spread
from simvq_moe.tasks.sequences import SequenceTask

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTINUED = 4
"""Held-out beginnings that are continued."""
BEGINNING, CONTINUATION = 32, 64
"""Tokens of a beginning, unless the context is shorter, and of its continuation."""
TEMPERATURE = 0.8
"""The temperature at which continuations are drawn, unless `generate` is told another."""


@register
class LanguageModelTask(SequenceTask):
    """A language model on text.

    Args:
        config: what is trained.
        tokenizer: file of the text tokenizer; None: the one trained on the source.
    """

    def __init__(self, config: Config, *, tokenizer: Path | None = None) -> None:
        train, corpus = _text(config, source=self.source(config), tokenizer=tokenizer)
        super().__init__(
            config=config,
            model=self.build_model(config),
            train=train,
            held_out=corpus.held_out,
            data_digest=corpus.digest,
        )
        self.corpus = corpus
        if self.model.end_of_text is not None:
            self.model.end_of_text.fill_(corpus.end_of_text)

    @classmethod
    def takes(cls, config: Config) -> bool:
        return super().takes(config) and not is_codes(config.data.source or cls.embedded)

    @classmethod
    def check_files(cls, config: Config) -> None:
        data = config.data
        if data.streaming:
            for source in data.sources or (cls.source(config),):
                check_stream(source, data.text_field)
        else:
            corpora.check_source(
                cls.source(config),
                text_field=data.text_field,
                held_out_source=data.held_out_source,
            )

    @classmethod
    def check_same_meaning(cls, config: Config, source: str) -> None:
        if is_codes(source):
            raise ConfigError(
                f"--data {source} holds codes, and data.source {config.data.source!r}, which the "
                "run was trained on, does not, or is gone: give text, or put the codes back there"
            )

    @classmethod
    def of_run(
        cls, config: Config, *, run_dir: Path, measures: Sequence[str] = ()
    ) -> LanguageModelTask:
        cls.check_measures(measures)
        return cls(config, tokenizer=_copied_tokenizer(run_dir, config))

    @classmethod
    def text_tokenizer(cls, config: Config, run_dir: Path) -> Tokenizer | None:
        file = run_dir / TOKENIZER_FILE
        if not os.path.lexists(file):  # of codes that are gone
            return None
        return load_tokenizer(str(file), config.data.vocabulary)

    @classmethod
    def kept_files(cls, config: Config, run_dir: Path) -> dict[str, bytes]:
        # read as a tokenizer first: a copy must not publish another file that a link leads to
        if cls.text_tokenizer(config, run_dir) is None:
            return {}
        return {TOKENIZER_FILE: read_bytes(run_dir / TOKENIZER_FILE)}

    @classmethod
    def continued(cls, run: DrawnFrom, prompt: str, tokens: int, drawing: Drawing) -> str:
        tokenizer = cls.text_tokenizer(run.config, run.folder)
        if tokenizer is None:
            return super().continued(run, prompt, tokens, drawing)
        beginning = torch.tensor([[end_of_text(tokenizer), *encode_text(tokenizer, prompt)]])
        model = model_of(run.config, run.weights)
        assert isinstance(model, LanguageModel)
        whole = model.generate(beginning, tokens, **drawing.options(TEMPERATURE))
        return tokenizer.decode(whole[0].tolist())

    def files_to_keep(self) -> dict[str, bytes]:
        return {TOKENIZER_FILE: self.corpus.tokenizer.read_bytes()}

    def evaluate(self, batch: Tensor) -> dict[str, Tensor]:
        """Nats, tokens and bytes of a held-out batch."""
        targets = batch[:, 1:]
        lengths = self.corpus.bytes_of_token.to(targets.device)[targets]
        return super().evaluate(batch) | {"bytes": lengths.sum().double()}

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {
            "val/loss": sums["nats"] / sums["tokens"],
            "val/bits_per_byte": sums["nats"] / math.log(2) / sums["bytes"],
        }

    @torch.no_grad()
    def samples(self, step: int, device: torch.device) -> Samples:
        del device
        with ready(self.model):
            return Samples(text=self.continuations(step))

    def continuations(self, step: int) -> str:
        """Held-out beginnings and what the model makes of them.

        Random numbers are those of seed and step; the generator of the training is not used.
        """
        model, held_out = self.model, self.held_out
        windows = held_out.batch(evenly_spread(len(held_out), CONTINUED))
        beginnings = windows[:, : min(BEGINNING, model.context)].to(model.embedding.weight.device)
        own = int(np.random.default_rng([self.config.seed, step]).integers(2**63))
        random = torch.Generator().manual_seed(own)
        whole = model.generate(beginnings, CONTINUATION, temperature=TEMPERATURE, generator=random)
        parts = [ids.cpu().tensor_split([beginnings.shape[1]]) for ids in whole]
        return "\n".join(
            f"=== beginning {i} ===\n{self.corpus.decode(first)}\n"
            f"=== continuation {i} ===\n{self.corpus.decode(rest)}\n"
            for i, (first, rest) in enumerate(parts, start=1)
        )


def _text(
    config: Config, *, source: str, tokenizer: Path | None
) -> tuple[DataSet | TextStream, Corpus]:
    """The training set, and the corpus that the held-out set and the tokenizer are of."""
    data = config.data
    common = {
        "vocabulary": data.vocabulary,
        "context": data.context,
        "cache_dir": data.cache_dir,
        "tokenizer": data.tokenizer if tokenizer is None else str(tokenizer),
        "on_corrupt": data.on_corrupt,
        "text_field": data.text_field,
    }
    if not data.streaming:
        corpus = corpora.token_windows(source, held_out_source=data.held_out_source, **common)
        assert corpus.train is not None
        return corpus.train, corpus
    return streaming.text_stream(
        data.sources or (source,),
        weights=data.source_weights,
        held_out_share=data.held_out_share,
        held_out_documents=data.held_out_documents,
        shuffle_buffer=data.shuffle_buffer,
        seed=config.seed,
        **common,
    )


def _copied_tokenizer(run_dir: Path, config: Config) -> Path | None:
    """The run's copy of its text tokenizer; None: it has none, or trained it on its source.

    Raises:
        ConfigError: the copy is gone, and the config names another file or one of the hub.
    """
    if (run_dir / TOKENIZER_FILE).is_file():
        return run_dir / TOKENIZER_FILE
    if config.data.tokenizer is not None:
        raise ConfigError(
            f"{run_dir} has no {TOKENIZER_FILE}, its copy of data.tokenizer "
            f"{config.data.tokenizer!r}: put it there"
        )
    return None
