"""What a prediction is, as it was written down before the runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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

    @property
    def number(self) -> str:
        """ "P6" of "P6, bias": what a sweep registers, with all its parts."""
        return self.name.partition(",")[0]

    @property
    def file(self) -> Path:
        """The file that its rule stands in."""
        return Path(inspect.getsourcefile(self.check) or "")
