"""What language models on text and on codes have in common: sequences of tokens, predicted."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
from jaxtyping import Int64
from torch import Tensor

from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.moe.routers.base import start_from_data
from simvq_moe.tasks.base import Task


class SequenceTask(Task[LanguageModel]):
    """A language model on sequences of tokens, whatever these stand for."""

    name = "language_model"
    embedded = "python-stdlib"
    sections = ("language_model", "moe")
    depths = ("language_model.layers",)
    has_norms = True

    @classmethod
    def _model(cls, config: Config) -> LanguageModel:
        return LanguageModel(
            config.data.vocabulary,
            config.data.context,
            **asdict(config.language_model),
            activation_checkpointing=config.train.activation_checkpointing,
            document_mask=config.data.document_mask,
            moe=config.moe,
        )

    @classmethod
    def tokens_of_a_sample(cls, config: Config) -> int:
        return config.data.context

    @classmethod
    def without_maps(cls, config: Config) -> Config:
        return replace(config, moe=config.moe.folded())

    @classmethod
    def merge_norms(cls, model: LanguageModel) -> None:
        try:
            model.merge_norms_()
        except ValueError as error:
            raise ConfigError(f"--merge_norms: {error}: drop it") from None

    @classmethod
    def outputs_of_noise(cls, model: LanguageModel, config: Config) -> Tensor:
        return model.logits(torch.randint(config.data.vocabulary, (8, config.data.context)))[0]

    @property
    def starts_from_data(self) -> bool:
        return self.config.moe.router.starts_from_data

    def start(self, batch: Tensor) -> None:
        start_from_data(self.model, batch)

    def compile(self) -> None:
        self.model.compile_blocks()

    def evaluate(self, batch: Tensor) -> dict[str, Tensor]:
        """Nats of all tokens but the first of each sequence, and their number."""
        return token_sums(self.model, batch)


def token_sums(model: LanguageModel, sequences: Int64[Tensor, "batch window"]) -> dict[str, Tensor]:
    """Nats of all tokens but the first of each sequence, and their number."""
    nats = model.token_nats(sequences)
    return {"nats": nats.double().sum(), "tokens": torch.tensor(float(nats.numel()))}
