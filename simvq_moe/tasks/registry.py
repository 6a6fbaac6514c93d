"""The class of a config's task, and what is asked of it most; see `config.tasks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simvq_moe.config import tasks as known
from simvq_moe.config.schema import Config
from simvq_moe.config.tasks import register as register
from simvq_moe.tasks.base import Task

AnyTask = Task[Any]


def tasks() -> Sequence[type[AnyTask]]:
    """Every task, our own first."""
    return known.tasks()


def task_of(config: Config) -> type[AnyTask]:
    """The class of a config's task.

    Raises:
        ConfigError: there is no such task.
    """
    return known.task_of(config)


def build_model(config: Config) -> Any:
    """The model of the config's task, started from its seed; the same seed gives arms the same
    weights where their shapes allow."""
    return task_of(config).build_model(config)


def build_task(config: Config) -> AnyTask:
    """Data and model of a config; the seed fixes the initial weights of the model."""
    return task_of(config)(config)  # pyright: ignore[reportCallIssue]


def fit_to_data(config: Config) -> Config:
    """The config with what its data alone say, see `Task.fit_to_data`."""
    return task_of(config).fit_to_data(config)


def check_files(config: Config) -> None:
    """Raise `ConfigError` for data or weights of others that are not here."""
    task_of(config).check_files(config)
