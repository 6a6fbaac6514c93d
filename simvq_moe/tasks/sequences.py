"""What language models on text and on codes have in common: sequences of tokens, predicted."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from simvq_moe.config.schema import Config, MoEConfig
from simvq_moe.errors import ConfigError
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.moe.routers.build import start_from_data
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
        moe = asdict(config.moe)
        names = ("balance", "z_loss", "router_codebook", "router_commitment")
        weights = {name.removesuffix("_loss"): moe.pop(f"{name}_weight") for name in names}
        if config.moe.balance != "aux":
            weights["balance"] = 0.0
        return LanguageModel(
            config.data.vocabulary,
            config.data.context,
            **asdict(config.language_model),
            activation_checkpointing=config.train.activation_checkpointing,
            document_mask=config.data.document_mask,
            loss_weights=weights,
            moe=moe | {"vocabulary": config.data.vocabulary},
        )

    @classmethod
    def without_maps(cls, config: Config) -> Config:
        moe = replace(config.moe, router_map="none", expert_out_map="none", expert_in_map="none")
        moe = replace(moe, router_base_width=None, train_router_base=True, router_init="default")
        if moe.whiten_router_input != "none":
            options = ("exponent", "decay", "floor", "every", "rank")
            defaults = {
                f"whitening_{name}": getattr(MoEConfig(), f"whitening_{name}") for name in options
            }
            moe = replace(moe, whiten_router_input="none", router_bias=True, **defaults)
        return replace(config, moe=moe)

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
        return self.config.moe.router_init == "data"

    def start(self, batch: Tensor) -> None:
        start_from_data(self.model, batch)

    def compile(self) -> None:
        self.model.compile_blocks()

    def evaluate(self, batch: Tensor) -> dict[str, Tensor]:
        """Nats of all tokens but the first of each sequence, and their number."""
        return token_sums(self.model, batch)


def token_sums(model: LanguageModel, sequences: Int64[Tensor, "batch window"]) -> dict[str, Tensor]:
    """Nats of all tokens but the first of each sequence, and their number."""
    logits, _ = model.logits(sequences[:, :-1])
    targets = sequences[:, 1:].flatten()
    nats = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none").double().sum()
    return {"nats": nats, "tokens": torch.tensor(float(len(targets)))}
