"""The class of a config's task, and what is made of it; which tasks there are: `config.tasks`."""

from __future__ import annotations

from typing import Any

from simvq_moe.config import tasks as known
from simvq_moe.config.schema import Config
from simvq_moe.config.tasks import register as register
from simvq_moe.tasks.base import Task

AnyTask = Task[Any]


def task_of(config: Config) -> type[AnyTask]:
    """The class of a config's task.

    Raises:
        ConfigError: there is no such task.
    """
    return known.task_of(config)


def build_model(config: Config) -> Any:
    """The model of a config, see `Task.build_model`."""
    return task_of(config).build_model(config)


def build_task(config: Config) -> AnyTask:
    """Data and model of a config; the seed fixes the initial weights of the model."""
    return task_of(config)(config)  # pyright: ignore[reportCallIssue]
