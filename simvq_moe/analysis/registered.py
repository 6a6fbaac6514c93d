"""What a prediction is, as it was written down before the runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from simvq_moe.analysis.arms import Group
from simvq_moe.analysis.results import Evidence


@dataclass(frozen=True)
class Registered:
    """A prediction as it was written down."""

    name: str
    statement: str
    needs: str
    """The arms that it takes, where there are none."""
    check: Callable[[Group], list[Evidence]]
    """Its docstring is the rule."""
