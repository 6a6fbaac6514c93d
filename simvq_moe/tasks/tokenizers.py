"""What the tokenizers of images and of audio have in common: codes between two data of one kind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from simvq_moe.config.schema import Config
from simvq_moe.core.bank import effective_rank
from simvq_moe.data.code_items import Item
from simvq_moe.engine.sharding import gathered
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import written_whole
from simvq_moe.models.tokenizer import Tokenizer
from simvq_moe.quantizers import AnyQuantizer, Quantizer
from simvq_moe.tasks.base import DataSet, Task
from simvq_moe.tasks.registry import task_of
from simvq_moe.tasks.samples import SHOWN, Samples, evenly_spread

Model = TypeVar("Model", bound=Tokenizer)


@runtime_checkable
class Measures(Protocol):
    """Sums over held-out samples, and the means of summed sums."""

    def to(self, device: torch.device) -> Any: ...

    def sums(self, samples: Tensor, reconstructions: Tensor, /) -> dict[str, Tensor]: ...

    def means(self, sums: Mapping[str, float]) -> dict[str, float]: ...


@dataclass(frozen=True)
class Parts:
    """The two data sets of a source."""

    train: DataSet
    held_out: DataSet
    digest: str
    """Differs when samples differ."""
    items: tuple[list[Item], list[Item]] | None = None
    """What the samples of both are windows of; None: they are crops."""


class TokenizerTask(Task[Model]):
    """A tokenizer that is trained to give back what it has turned into codes.

    Args:
        config: what is trained.
        measures: of held-out samples; None: those that need no network of others.
    """

    loss_measure: ClassVar[str]
    """The held-out measure that is also called val/loss."""
    suffix: ClassVar[str]
    """The suffix of the file of a sample."""

    def __init__(self, config: Config, *, measures: Measures | None = None) -> None:
        crops = self.crops(config)
        super().__init__(
            config=config,
            model=self.build_model(config),
            train=crops.train,
            held_out=crops.held_out,
            data_digest=crops.digest,
        )
        self.measures = measures or self.own_measures(config)

    @classmethod
    def stage_problems(cls, config: Config) -> Iterator[str]:
        weight = getattr(getattr(config, cls.name, None), "adversarial_weight", 0)
        if config.train.zero_stage == 3 and weight:
            yield (
                f"train.zero_stage 3 with {cls.name}.adversarial_weight {weight}: DeepSpeed can't "
                "gather discriminators that are held fixed in the same step: use train.zero_stage 2"
            )

    @classmethod
    @abstractmethod
    def own_measures(cls, config: Config) -> Measures:
        """The measures that need no network of others."""

    @classmethod
    @abstractmethod
    def crops(cls, config: Config) -> Parts:
        """The random crops that the config draws."""

    @classmethod
    @abstractmethod
    def windows(cls, config: Config) -> Parts:
        """Windows of the size of a crop, which cover every image or recording of a source once."""

    @classmethod
    def sample_rate(cls, config: Config) -> int:
        """Values of a sample a second; 0: a sample does not go on in time."""
        del config
        return 0

    @classmethod
    @abstractmethod
    def empty(cls, sides: Sequence[int]) -> np.ndarray:
        """An image or a recording of this size, to be filled by windows."""

    @classmethod
    @abstractmethod
    def values(cls, samples: Tensor) -> np.ndarray:
        """What a file holds of samples in [-1, 1]; what lies outside is cut off."""

    @classmethod
    def save(cls, values: np.ndarray, file: Path, *, sample_rate: int) -> None:
        """Write the values of one sample as a file that appears whole."""
        with written_whole(file) as aside:
            cls._write(values, aside, sample_rate)

    @classmethod
    @abstractmethod
    def _write(cls, values: np.ndarray, file: Path, sample_rate: int) -> None: ...

    @classmethod
    @abstractmethod
    def shown(cls, samples: Mapping[str, Tensor], *, sample_rate: int) -> Samples:
        """Batches by name, beside or below each other."""

    @classmethod
    def without_maps(cls, config: Config) -> Config:
        folded = config.quantizer.folded()
        if folded is None:
            kind = config.quantizer.kind
            raise ConfigError(
                f"quantizer.kind {kind!r} has no shared map: there is nothing to fold"
            )
        return replace(config, quantizer=folded)

    @classmethod
    def outputs_of_noise(cls, model: Model, config: Config) -> Tensor:
        return model.reconstruct(cls._noise(model, config))[0]

    @classmethod
    @abstractmethod
    def _noise(cls, model: Model, config: Config) -> Tensor:
        """A few random samples in [-1, 1]."""

    @property
    def starts_from_data(self) -> bool:
        return True

    def start(self, batch: Tensor) -> None:
        self.model.initialize(batch)

    def evaluate(self, batch: Tensor) -> dict[str, Tensor]:
        reconstruction = self.model.reconstruct(batch)[0]
        return self.measures.to(batch.device).sums(batch, reconstruction)

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        means = self.measures.means(sums)
        loss = {"val/loss": means[self.loss_measure]}
        return loss | means | _rank_of_used_codes(self.model.quantizer)

    @torch.no_grad()
    def samples(self, step: int, device: torch.device) -> Samples:
        del step
        self.model.eval()
        batch = self.held_out.batch(evenly_spread(len(self.held_out), SHOWN)).to(device)
        pair = {"original": batch, "reconstruction": self.model.reconstruct(batch)[0]}
        return self.shown(pair, sample_rate=self.sample_rate(self.config))


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


def tokenizer_task(config: Config, run_dir: Path) -> type[TokenizerTask[Any]]:
    """The task of a tokenizer's run.

    Raises:
        ConfigError: the run is of another task.
    """
    task = task_of(config)
    if not issubclass(task, TokenizerTask):
        raise ConfigError(f"{run_dir} is a run of task {config.task!r}: give a tokenizer's run")
    return task


def check_not_empty(source: str, train: DataSet, held_out: DataSet) -> None:
    """Raise `ConfigError` for a source without anything on one of its two sides."""
    for part, samples in (("train", train), ("held_out", held_out)):
        if not len(samples):
            raise ConfigError(f"data.source {source!r} has nothing that is {part}: give more files")
