"""What language models on text and on codes have in common: sequences of tokens, predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from simvq_moe.config.schema import Config
from simvq_moe.data.codes import CodeSequences
from simvq_moe.data.text.tokens import TokenWindows
from simvq_moe.errors import ConfigError
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.moe.routers.base import start_from_data
from simvq_moe.tasks.base import Task
from simvq_moe.tasks.checks import language_problems
from simvq_moe.tasks.probe_tokens import ProbeTokens, choose_tokens


class SequenceTask(Task[LanguageModel]):
    """A language model on sequences of tokens, whatever these stand for."""

    name = "language_model"
    embedded = "python-stdlib"
    sections = ("language_model", "moe")
    depths = ("language_model.layers",)
    own_options = (
        *("data.tokenizer", "data.document_mask", "data.streaming", "data.on_corrupt"),
        *("data.text_field", "data.held_out_source"),
        *("train.activation_checkpointing", "train.compile"),
    )
    has_norms = True

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        return language_problems(config)

    @classmethod
    def stage_problems(cls, config: Config) -> Iterator[str]:
        moe, stage = config.moe, config.train.zero_stage
        if not config.language_model.moe_every:
            return
        split = moe.expert_parallel > 1
        if stage == 0 and split:
            yield (
                f"train.zero_stage 0 with moe.expert_parallel {moe.expert_parallel}: DeepSpeed's "
                "norm there leaves out the experts of other ranks: use train.zero_stage 1 or 2"
            )
        if stage == 3 and (split or moe.dispatch == "deepspeed_capacity"):
            key = "expert_parallel" if split else "dispatch"
            yield (
                f"train.zero_stage 3 with moe.{key} {getattr(moe, key)!r}: DeepSpeed shards no "
                "parameters of such experts: use train.zero_stage 2"
            )

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

    def probe_tokens(self, number: int) -> ProbeTokens:
        assert isinstance(self.held_out, TokenWindows | CodeSequences)
        return choose_tokens(self.held_out, number)

    def route(self, windows: Int[Tensor, "batch window"]) -> None:
        self.model.hidden_states(windows[:, :-1])

    def evaluate(self, batch: Tensor) -> dict[str, Tensor]:
        """Nats of all tokens but the first of each sequence, and their number."""
        return token_sums(self.model, batch)


def token_sums(model: LanguageModel, sequences: Int64[Tensor, "batch window"]) -> dict[str, Tensor]:
    """Nats of all tokens but the first of each sequence, and their number."""
    nats = model.token_nats(sequences)
    return {"nats": nats.double().sum(), "tokens": torch.tensor(float(nats.numel()))}
