"""The tasks: which one a config is about, and what belongs to one alone.

A task registers its class, in a file of simvq_moe/tasks or in a plug-in; those files are imported
when a task is first asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from simvq_moe.config.checks_moe import with_default_gates
from simvq_moe.config.loading import changed
from simvq_moe.config.plugins import load_installed_plugins
from simvq_moe.config.registry import import_all
from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError

PACKAGE = "simvq_moe.tasks"
TaskClass = TypeVar("TaskClass", bound=type[Any])
_REGISTERED: list[type[Any]] = []


def register(task: TaskClass) -> TaskClass:
    """Make a class one of the tasks.

    Where two take a config, one of a plug-in comes before our own, and the last registered first.
    """
    same = f"{task.__module__}.{task.__qualname__}"  # again, of a module that was loaded anew
    others = [other for other in _REGISTERED if f"{other.__module__}.{other.__qualname__}" != same]
    _REGISTERED[:] = [*others, task]
    return task


def tasks() -> Sequence[type[Any]]:
    """Every task, our own first."""
    import_all(PACKAGE)
    load_installed_plugins()
    return sorted(_REGISTERED, key=lambda task: not task.__module__.startswith(f"{PACKAGE}."))


def task_of(config: Config) -> type[Any]:
    """The class of a config's task.

    Raises:
        ConfigError: there is no such task.
    """
    known = tasks()
    for task in reversed(known):
        if task.takes(config):
            return task
    names = ", ".join(sorted({repr(task.name) for task in known}))
    raise ConfigError(f"task {config.task!r}: use one of {names}")


def task_problems(config: Config) -> Iterator[str]:
    """What each task says of its sections, and what is set of tasks that are not the config's."""
    for task in dict.fromkeys(tasks()):
        yield from task.problems(config)
    owners: dict[str, dict[str, None]] = {}
    for task in tasks():
        for key in (*task.own_options, *task.sections):
            owners.setdefault(key, {})[task.name] = None
    for key, value in changed(with_default_gates(config)).items():
        names = owners.get(key) or owners.get(key.partition(".")[0]) or {config.task: None}
        if config.task not in names:
            having = " and ".join(map(repr, sorted(names)))  # tasks stand as they were imported
            has = "has" if len(names) == 1 else "have"
            yield f"{key} {value!r} with task {config.task!r}: only {having} {has} it: drop it"


def without_other_tasks(config: Config) -> dict[str, Any]:
    """The config as nested mappings, without the sections that its task has no use for."""
    others = {name for task in tasks() for name in task.sections} | {"task_options"}
    kept = task_of(config).sections
    whole = asdict(config).items()
    return {name: section for name, section in whole if name in kept or name not in others}
