"""A task: what is trained, from its source to its samples. The loop and the commands ask it.

What can be asked before there are data or a model is asked of the class; an object has both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    NamedTuple,
    Protocol,
    TypeVar,
    runtime_checkable,
)

import torch
from jaxtyping import Int
from torch import Tensor, nn

from simvq_moe.config.schema import Config
from simvq_moe.data.text.streaming import TextStream
from simvq_moe.errors import ConfigError
from simvq_moe.tasks.drawing import Drawing, DrawnFrom
from simvq_moe.tasks.probe_tokens import ProbeTokens
from simvq_moe.tasks.samples import Samples

if TYPE_CHECKING:
    from tokenizers import Tokenizer as TextTokenizer

Model = TypeVar("Model", bound=nn.Module)


@runtime_checkable
class DataSet(Protocol):
    """A fixed set of samples, read by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Any) -> Tensor: ...


class CountedSample(NamedTuple):
    """A sample whose values lie in [-1, 1], on which the costs of a model are counted."""

    shape: tuple[int, ...]
    numbers: int
    """About how many a forward pass makes of it at its full resolution."""


class Task(ABC, Generic[Model]):
    """A model with its data and measures; `model(batch)` returns the loss and its terms.

    Args:
        config: what is trained.
        model: with the weights that it starts from.
        train: the training set.
        held_out: the held-out set.
        data_digest: differs when the data of either side differ: a run goes on with those that it
            began with.
    """

    name: ClassVar[str]
    """The value of `task` in a config."""
    embedded: ClassVar[str]
    """The source that comes with the package, which is read where a config names none."""
    sections: ClassVar[tuple[str, ...]]
    """The sections of a config that this task reads beside those that every task reads."""
    own_options: ClassVar[tuple[str, ...]] = ()
    """The keys of a config, in sections that all tasks read, that mean nothing to the others."""
    depths: ClassVar[tuple[str, ...]] = ()
    """The keys of a config of which every unit has a tensor of its own, or more."""
    has_norms: ClassVar[bool] = False
    """Whether the gains of its models' norms can be merged, see `merge_norms`."""

    def __init__(
        self,
        *,
        config: Config,
        model: Model,
        train: DataSet | TextStream,
        held_out: DataSet,
        data_digest: str,
    ) -> None:
        self.config, self.model = config, model
        self.train, self.held_out = train, held_out
        self.data_digest = data_digest

    # asked of a config alone

    @classmethod
    def takes(cls, config: Config) -> bool:
        """Whether this is the task of a config."""
        return config.task == cls.name

    @classmethod
    def source(cls, config: Config) -> str:
        """The data source of a config, or the embedded one."""
        return config.data.source or cls.embedded

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        """What of this task's sections can't run, whatever the config's task: the key, the value
        and the way out, a line each."""
        del config
        return iter(())

    @classmethod
    def stage_problems(cls, config: Config) -> Iterator[str]:
        """What DeepSpeed's stage, `train.zero_stage`, gets wrong with a model of this task."""
        del config
        return iter(())

    @classmethod
    def fit_to_data(cls, config: Config) -> Config:
        """The config with what its data alone say.

        Raises:
            ConfigError: the config says otherwise.
        """
        return config

    @classmethod
    @abstractmethod
    def check_files(cls, config: Config) -> None:
        """Raise `ConfigError` for a source that holds nothing readable, or for a network of the
        loss whose weights are not at hand."""

    @classmethod
    def check_same_meaning(cls, config: Config, source: str) -> None:
        """Make sure that samples mean in `source` what they meant in the data of a finished run.

        Args:
            config: of the run.
            source: of other data, which the run's model is asked about.

        Raises:
            ConfigError: they mean something else.
        """
        del config, source

    @classmethod
    def lacks_networks(cls, config: Config) -> bool:
        """Whether the loss needs a network of others whose weights are not at hand."""
        del config
        return False

    @classmethod
    def without_networks(cls, config: Config) -> Config:
        """The config of the same model whose loss needs no network of others: these judge while a
        model learns, and their files may be on another machine."""
        return config

    @classmethod
    def build_model(cls, config: Config) -> Model:
        """The model of a config, started from its seed: arms get the same weights where their
        shapes allow it."""
        torch.manual_seed(config.seed)
        return cls._model(config)

    @classmethod
    @abstractmethod
    def _model(cls, config: Config) -> Model:
        """The model, from the random numbers of torch's own generator."""

    @classmethod
    @abstractmethod
    def tokens_of_a_sample(cls, config: Config) -> int:
        """Codes or text tokens of one sample."""

    @classmethod
    def counted_sample(cls, config: Config) -> CountedSample | None:
        """The sample on which a forward pass counts costs; None: they are counted from the model's
        description, without a pass."""
        del config
        return None

    # asked of a finished run

    @classmethod
    def text_tokenizer(cls, config: Config, run_dir: Path) -> TextTokenizer | None:
        """The tokenizer of the text that a run's model reads and writes, from the run's folder or
        that of its folded model; None: there is none.

        Raises:
            ConfigError: its file holds none, or one of another vocabulary.
        """
        del config, run_dir
        return None

    @classmethod
    def kept_files(cls, config: Config, run_dir: Path) -> dict[str, bytes]:
        """What `files_to_keep` has left in a run's folder, by name.

        Raises:
            ConfigError: a file is not what it should be.
        """
        del config, run_dir
        return {}

    @classmethod
    def continued(cls, run: DrawnFrom, prompt: str, tokens: int, drawing: Drawing) -> str:
        """A text and what the run's model makes of it, so many tokens.

        Raises:
            ConfigError: this task makes no text, or the run lacks its tokenizer.
        """
        del prompt, tokens, drawing
        raise ConfigError(
            f"{run.folder} is a run of task {run.config.task!r} without a tokenizer.json: give the "
            "folder of a language model's run, and --out for one on codes"
        )

    @classmethod
    def write_new_samples(cls, run: DrawnFrom, out: Path, samples: int, drawing: Drawing) -> None:
        """Write what the run's model makes of nothing, a file each, into a folder, which appears
        whole or not.

        Raises:
            ConfigError: this task makes no such samples.
        """
        del samples, drawing
        raise ConfigError(
            f"--out {out}: {run.folder} is no language model on codes, or those in data.source "
            f"{run.config.data.source!r} are gone: drop --out for text"
        )

    # asked by `fold`

    @classmethod
    @abstractmethod
    def without_maps(cls, config: Config) -> Config:
        """The config of the folded model.

        Raises:
            ConfigError: its rows are no linear map of their base.
        """

    @classmethod
    def merge_norms(cls, model: Model) -> None:
        """Merge the gains of norms into the matrices that read their outputs.

        Raises:
            ConfigError: the model has no norms, or some that do not merge.
        """
        del model
        raise ConfigError(f"--merge_norms: task {cls.name!r} has no norms: drop it")

    @classmethod
    @abstractmethod
    def outputs_of_noise(cls, model: Model, config: Config) -> Tensor:
        """What the model makes of a few random inputs, drawn from torch's own generator."""

    # a task with its data

    @classmethod
    def of_run(cls, config: Config, *, run_dir: Path, measures: Sequence[str] = ()) -> Task[Model]:
        """The task of a finished run, to evaluate its model.

        Args:
            config: of the run.
            run_dir: the run's folder.
            measures: names of further measures, such as "lpips".

        Raises:
            ConfigError: one of the measures is none of this task, or lacks its network.
        """
        del run_dir
        cls.check_measures(measures)
        return cls(config)  # pyright: ignore[reportCallIssue]

    @classmethod
    def check_measures(cls, measures: Sequence[str]) -> None:
        """Raise `ConfigError` for further measures of a task that has none."""
        for name in measures:
            raise ConfigError(f"--{name}: task {cls.name!r} has no such measure: drop it")

    @property
    def tokens_per_sample(self) -> int:
        """Codes or text tokens of one sample."""
        return self.tokens_of_a_sample(self.config)

    @property
    def starts_from_data(self) -> bool:
        """Whether the model starts from the first training batch."""
        return False

    def start(self, batch: Tensor) -> None:
        """Start what starts from data; all ranks call it together, before the engine is built.

        Args:
            batch: this rank's part of the first training batch.
        """
        del batch

    def files_to_keep(self) -> dict[str, bytes]:
        """Files of the data that lie beside the model for good, by name; see `kept_files`."""
        return {}

    def compile(self) -> None:
        """Compile the parts of the model whose sizes are known beforehand, if there are any."""

    def probe_tokens(self, number: int) -> ProbeTokens | None:
        """About so many held-out tokens, whose routing the probe follows; None: no probe."""
        del number
        return None

    def route(self, windows: Int[Tensor, "batch window"]) -> None:
        """Send windows of `probe_tokens` through the layers of experts, each input token once and
        in order."""
        raise NotImplementedError(f"{type(self).__name__} gives probe_tokens, and no route")

    @abstractmethod
    def evaluate(self, batch: Tensor) -> dict[str, Tensor]:
        """Sums over a held-out batch, to be added over batches and ranks.

        The batch of a rank that has none left is empty: others may wait for its part of the model.
        """

    @abstractmethod
    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Held-out measures by name, from the sums over the held-out set."""

    @abstractmethod
    def samples(self, step: int, device: torch.device) -> Samples:
        """What the model makes at a step, to look at, to listen to or to read; all ranks call it
        together, because they may share experts or parameters."""
