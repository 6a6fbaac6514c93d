"""What language models on text and on codes have in common: sequences of tokens, predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from simvq_moe.config.schema import Config
from simvq_moe.data.codes import CodeSequences, is_codes
from simvq_moe.data.text.tokens import TokenWindows
from simvq_moe.errors import ConfigError
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.moe.routers.base import start_from_data
from simvq_moe.tasks.base import Task
from simvq_moe.tasks.checks import meaningless
from simvq_moe.tasks.probe_tokens import ProbeTokens, choose_tokens

OF_STREAMS = (
    *("sources", "source_weights", "held_out_share", "held_out_documents", "shuffle_buffer"),
)
"""Options of the data that mean nothing without data.streaming."""
LEAST_OF_TEXT = 257
"""Least vocabulary of text: the bytes and the end of text; of codes it may be smaller."""


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
        return _problems(config)

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


def _problems(config: Config) -> Iterator[str]:
    """Options of the language model and its data that mean nothing, or do not go together."""
    lm, data = config.language_model, config.data
    if lm.width % lm.heads or (lm.width // lm.heads) % 2:
        yield (
            f"language_model.width {lm.width} / language_model.heads {lm.heads} must be a whole "
            "even number for rotary positions: change one of them"
        )
    if lm.moe_every > lm.layers:
        yield (
            f"language_model.moe_every {lm.moe_every} > language_model.layers {lm.layers}: no "
            "block would have a mixture: lower it, or use 0 for dense blocks"
        )
    if data.vocabulary < LEAST_OF_TEXT and not (data.source is not None and is_codes(data.source)):
        yield f"data.vocabulary {data.vocabulary} < {LEAST_OF_TEXT}: use at least {LEAST_OF_TEXT}"
    if not data.streaming:
        without = "with data.streaming False: drop it, or set data.streaming to True"
        yield from meaningless("data", data, OF_STREAMS, without)
    if data.sources and data.source is not None:
        yield (
            f"data.source {data.source!r} with data.sources {data.sources}: add it to "
            "data.sources, or drop one of them (--data.source None)"
        )
    if data.held_out_source is not None and data.streaming:
        yield (
            f"data.held_out_source {data.held_out_source!r} with data.streaming True: held-out "
            "documents of streams are a part of them, data.held_out_share: drop one of them"
        )
    if data.source is not None and is_codes(data.source) and data.held_out_source is not None:
        yield (
            f"data.held_out_source {data.held_out_source!r} with data.source {data.source!r}: "
            "codes have a held-out part of their own: drop it"
        )
    weights = data.source_weights
    if weights and (len(weights) != len(data.sources) or not min(weights) > 0):
        yield (
            f"data.source_weights {weights} with data.sources {data.sources}: give as many, each "
            "above 0"
        )
    if not 0 < data.held_out_share < 1:
        yield f"data.held_out_share {data.held_out_share}: use more than 0 and less than 1"
