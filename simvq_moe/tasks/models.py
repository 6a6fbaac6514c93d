"""Models from the config; the same seed gives arms the same weights where their shapes allow."""

from __future__ import annotations

from typing import Any

from simvq_moe.config.schema import Config
from simvq_moe.tasks.registry import task_of


def build_model(config: Config) -> Any:
    """The model of the config's task, started from its seed."""
    return task_of(config).build_model(config)
