"""What a metric is: its name, unit and meaning, how it is printed and where it is charted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Chart = Literal[
    "overview", "detail", "table", "routers", "costs", "outcome", "curve", "maps", "moves"
]
"""Where a metric is shown beside metrics.jsonl, TensorBoard's list of all scalars, and wherever a
sweep names it as an outcome:
    overview  TensorBoard at a glance and its HParams table, the report's table in the terminal, the
              line that a finished run prints
    detail    TensorBoard's charts of every layer
    table     the report's result table, and its row of even chance
    routers   the report's table of routers
    costs     the report's table of costs
    outcome   the first of them that a run has is the outcome of runs without a sweep
    curve     a figure over steps in the report
    maps      a figure over steps in the report, one for each kind of bank
    moves     likewise, where something moves
"""
PARTS = {
    "[val/]": "(?:val/)?",
    "{slots}": r"(?:codes|(?:codes|moe|moe_kept)/(?:\d{1,9}|mean))",
    "{kind}": "(?:codes|moe|moe_kept)",
    "{layer}": r"(?:\d{1,9}|mean)",
    "{bank}": ".+",
    "{task}": r"[\w.-]+",
    "{measure}": r"[\w.-]+",
    "/{step}": r"(?:/\d{1,15})?",
}
"""What stands for a part of a name, and the names that it stands for:
    [val/]   the held-out set; without it the window of training since the last logged step
    {slots}  where slots are counted: one codebook, a numbered one, a layer, or the mean of all
    {kind}   codes, experts as they were chosen, experts after a capacity
    {layer}  a number from 00 on in the order of the model, or the mean
    {bank}   a number from 00 on, named in meta.json; in a report the kind of bank
    {task}   a task of lm-eval, as `eval --tasks` names it
    {measure}  what lm-eval calls a measure
    /{step}  a step of training; without one, all that there are
"""


@dataclass(frozen=True)
class Metric:
    """A number that a run logs under a name, or under several names of one form."""

    name: str
    """Its name in metrics.jsonl and summary.json; `PARTS` says what stands for a part of it."""
    label: str
    """What it is called in tables, figures and sentences."""
    meaning: str
    """One sentence that says what it measures."""
    unit: str = ""
    """Its unit; empty: a plain number."""
    decimals: int | None = None
    """Digits after the point, one fewer from 100 on; None: four significant digits."""
    better: Literal["higher", "lower"] | None = None
    """Which is better; None: neither, such as a cost that is a choice."""
    charts: tuple[Chart, ...] = ()
    """Where it is shown."""
    pair: int | None = None
    """Its place among the usage measures that a report compares with the baseline beside the
    outcomes, and draws over steps; None: it is none of them."""
    brief: str = ""
    """How the progress line prints it, "used {:.0%}"; `watch` has a column "used". Empty: none."""
    log: bool = False
    """Whether it is drawn on a logarithmic axis."""
    margin: float | None = None
    """Largest difference that counts as none, for tests of equivalence."""

    @property
    def is_share(self) -> bool:
        """Whether it lies between 0 and 1 and is printed in percent, its differences in points."""
        return self.unit == "share"

    @property
    def leaf(self) -> str:
        """The last part of the name that is the same wherever the metric is logged."""
        return next(part for part in reversed(self.name.split("/")) if part[0] != "{")

    @property
    def column(self) -> str:
        """What `watch` calls it."""
        return re.sub("{.*}", "", self.brief).strip()

    def cell(self, value: float) -> str:
        """How `watch` prints it."""
        return "".join(re.findall("{.*}", self.brief)).format(value)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What its names match."""
        text = re.escape(self.name)
        for part, names in PARTS.items():
            text = text.replace(re.escape(part), names)
        return re.compile(text)
