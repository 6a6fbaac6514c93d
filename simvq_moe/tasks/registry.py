"""The tasks by name: which one a config is about. A plug-in registers its own in the same way."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, TypeVar

from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError
from simvq_moe.tasks.base import Task

AnyTask = Task[Any]
TaskClass = TypeVar("TaskClass", bound=type[AnyTask])

OWN = ("image", "audio", "text", "codes")
"""The modules beside this one that register tasks, imported when a task is first asked for."""
_REGISTERED: list[type[AnyTask]] = []


def register(task: TaskClass) -> TaskClass:
    """Make a class one of the tasks; it comes before those that were registered earlier, wherever
    both take a config."""
    same = f"{task.__module__}.{task.__qualname__}"  # again, of a module that was loaded anew
    others = [other for other in _REGISTERED if f"{other.__module__}.{other.__qualname__}" != same]
    _REGISTERED[:] = [*others, task]
    return task


def tasks() -> Sequence[type[AnyTask]]:
    """Every task, the first registered first."""
    for module in OWN:
        importlib.import_module(f"simvq_moe.tasks.{module}")
    return tuple(_REGISTERED)


def task_of(config: Config) -> type[AnyTask]:
    """The class of a config's task.

    Raises:
        ConfigError: there is no such task.
    """
    known = tasks()
    for task in reversed(known):
        if task.takes(config):
            return task
    names = ", ".join(dict.fromkeys(repr(task.name) for task in known))
    raise ConfigError(f"task {config.task!r}: use one of {names}")


def build_task(config: Config) -> AnyTask:
    """Data and model of a config; the seed fixes the initial weights of the model."""
    return task_of(config)(config)  # pyright: ignore[reportCallIssue]


def fit_to_data(config: Config) -> Config:
    """The config with what its data alone say, see `Task.fit_to_data`."""
    return task_of(config).fit_to_data(config)


def check_files(config: Config) -> None:
    """Raise `ConfigError` for data or weights of others that are not here."""
    task_of(config).check_files(config)


def source_of(config: Config) -> str:
    """The data source of a config, or the embedded one of its task."""
    return task_of(config).source(config)
