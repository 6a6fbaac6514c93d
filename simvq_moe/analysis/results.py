"""What report.json holds: every number that a report shows, in one stable structure.

    {"title", "level", "confidence", "least_pairs",
     "predictions": [{"name", "statement", "rule", "needs", "verdict",
                      "evidence": [{"group", "text", "metric", "arms", "seeds",
                                    "values": [a seed], "n", "mean", "interval", "p", "margin",
                                    "p_equivalent", "verdict",
                                    "pairs_needed"}], "pairs_needed"}],
     "registered": [{"sweep", "file", "commit", "date", "first_run", "before"}],
     "groups": [{"name", "sweep", "question", "notes", "config", "command", "warnings", "kind",
                 "baseline", "outcomes", "primary": {arm: outcome}, "pairs_needed",
                 "seeds", "verdict": [sentence], "secondary": [sentence], "negative": [sentence],
                 "arms": [{"name", "label", "control", "baseline", "n", "status": [a seed],
                           "values": {metric: [a seed]}, "mean": {metric}, "sd": {metric},
                           "differs": {config key: [baseline's, its]}}],
                 "null": [{"arms", "slots", "top_k", "tokens", "draws", "ceiling",
                           "values": {metric}}],
                 "paired": [{"arm", "metric", "primary", "differences": [a seed], "unpaired",
                             "n", "agree", "mean", "relative", "sd", "interval": [low, high],
                             "p", "p_min", "p_holm", "tests", "margin", "p_equivalent"}],
                 "curves", "loads", "profiles", "routings", "spectra": what the figures draw,
                 "left_out": [sentence]}],
     "runs": [{"group", "arm", "seed", "status", "error", "step", "last", "path", "command",
               "environment"}]}

Lists "a seed" follow the group's "seeds". What does not exist or is not finite is null. Shares
are fractions here and percent on the pages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from simvq_moe.analysis import stats
from simvq_moe.analysis.curves import Curve, Loads, Profile
from simvq_moe.analysis.routings import RoutingOf
from simvq_moe.analysis.spectra import Spectrum
from simvq_moe.records.catalogue import HELD_OUT


@dataclass(frozen=True)
class ArmResult:
    """One line of the result table. Lists have one entry a seed of the group, None where none."""

    name: str
    label: str
    control: bool
    baseline: bool
    n: int
    """Finished runs."""
    status: list[str]
    values: dict[str, list[float | None]]
    mean: dict[str, float]
    sd: dict[str, float]
    """Sample standard deviation over seeds; nan for one."""
    differs: dict[str, list[Any]]
    """Config keys in which it differs from the baseline: [baseline's value, its value]."""


@dataclass(frozen=True)
class Null:
    """What uniform random choices would score, with as many draws."""

    arms: list[str]
    slots: int
    top_k: int
    tokens: int
    """Held-out tokens counted."""
    draws: int
    """tokens x top_k."""
    ceiling: float
    """Share of slots that uniform choices reach, 1 - exp(-draws / slots)."""
    values: dict[str, float]


@dataclass(frozen=True)
class Paired:
    """An arm against the baseline on one metric, over seeds that both finished."""

    arm: str
    metric: str
    primary: bool
    """One of the tests fixed beforehand: these, and only these, make up Holm's family."""
    differences: list[float | None]
    """Arm minus baseline; one entry a seed of the group, None for no pair."""
    unpaired: list[int]
    """Seeds planned on either side without a finished run on both."""
    n: int
    agree: int
    """Pairs whose difference has the sign of the mean."""
    mean: float
    relative: float
    """mean over the baseline's mean over the same seeds."""
    sd: float
    interval: tuple[float, float] | None
    p: float | None
    p_min: float | None
    p_holm: float | None
    tests: int
    """Tests of the family that p_holm is adjusted over; 0: it is in none."""
    margin: float | None
    """Largest difference that counts as none, of the metrics that have one."""
    p_equivalent: float | None
    """p of the two one-sided t tests: small claims a difference within the margin."""


@dataclass(frozen=True)
class GroupResult:
    """One question with everything that was measured for it."""

    name: str
    sweep: str
    question: str
    notes: str
    config: str
    command: str
    warnings: list[str]
    """Sentences without which the verdict would mislead."""
    verdict: list[str]
    """Sentences that answer the question and say what n allows."""
    secondary: list[str]
    """Sentences on all that was not named primary."""
    negative: list[str]
    """Sentences on what did not work, and on what could not be shown."""
    kind: str | None
    """What is chosen between: codes, experts, or None."""
    baseline: str
    outcomes: list[str]
    primary: dict[str, str]
    pairs_needed: int
    """The fewest pairs with which the smallest p of Holm's family can be below the level."""
    seeds: list[int]
    arms: list[ArmResult]
    null: list[Null]
    """One for each number of slots and draws among the arms."""
    paired: list[Paired]
    curves: list[Curve]
    loads: list[Loads]
    profiles: list[Profile]
    routings: list[RoutingOf]
    spectra: list[Spectrum]
    left_out: list[str]
    """Files that can't be read and that no number needs, each with the reason."""

    @property
    def baseline_arm(self) -> ArmResult | None:
        return next((arm for arm in self.arms if arm.baseline), None)

    def metric(self, measure: str) -> str:
        """The name under which this group's usage measure is logged."""
        return HELD_OUT[self.kind or "codes"] + measure

    @property
    def errors(self) -> list[str]:
        """Outcomes that are no usage measure: the held-out error column."""
        return [name for name in self.outcomes if not name.startswith(tuple(HELD_OUT.values()))]


@dataclass(frozen=True)
class Evidence:
    """One case of a prediction: a number for each seed, and what they say together."""

    group: str
    text: str
    """What the number is."""
    metric: str
    """It is printed like this one."""
    arms: list[str]
    """Names of the arms it is computed from."""
    seeds: list[int]
    values: list[float]
    """One for each of the seeds."""
    n: int
    mean: float
    interval: tuple[float, float] | None
    p: float | None
    """Exact two-sided permutation p of a mean of 0, not adjusted."""
    margin: float | None
    p_equivalent: float | None
    verdict: str
    """supported, contradicted or undecided."""
    pairs_needed: int | None = None
    """Pairs that could decide it, where these could not whatever they say; None: these could."""


@dataclass(frozen=True)
class Prediction:
    """A registered prediction and what became of it."""

    name: str
    statement: str
    rule: str
    """How it is decided, fixed before the runs."""
    needs: str
    """Arms without which it is not tested."""
    verdict: str
    """supported, contradicted, undecided or not tested."""
    evidence: list[Evidence]
    pairs_needed: int | None = None
    """The most that undecided evidence needs; None: the pairs are enough."""
    before: bool | None = None
    """Whether it was committed before the first run, and unchanged since; None: not recorded."""


@dataclass(frozen=True)
class Registration:
    """A file that says beforehand what a sweep is to show."""

    sweep: str
    file: str
    commit: str | None
    """The commit of its last change; None: it was not committed, or is in no repository."""
    date: str | None
    first_run: str | None
    """When the sweep's first run was started; None: none has, or it is not recorded."""
    before: bool | None
    """Whether the change came before the first run; None: that is not known."""


@dataclass(frozen=True)
class RunResult:
    """One run of the list of runs, as it ended."""

    group: str
    """Empty for a run that can't be read and has no sweep."""
    arm: str
    seed: int
    status: str
    error: str | None
    step: int
    last: dict[str, float]
    """Outcomes at its last evaluation, finished or not."""
    path: str
    """Relative to the report."""
    command: str
    environment: dict[str, str]


@dataclass(frozen=True)
class Results:
    """All groups and all runs; report.json is this."""

    title: str
    predictions: list[Prediction] = field(default_factory=list)
    registered: list[Registration] = field(default_factory=list)
    groups: list[GroupResult] = field(default_factory=list)
    runs: list[RunResult] = field(default_factory=list)
    level: float = stats.LEVEL
    """Level of significance."""
    confidence: float = stats.CONFIDENCE
    """Confidence of intervals."""
    least_pairs: int = stats.LEAST_PAIRS

    def as_json(self) -> dict[str, Any]:
        """Plain containers; nan and infinities, which JSON has not, become None."""
        return _plain(self)


def _plain(content: Any) -> Any:
    if hasattr(content, "__dataclass_fields__"):
        return {name: _plain(getattr(content, name)) for name in content.__dataclass_fields__}
    if isinstance(content, dict):
        return {key: _plain(v) for key, v in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(v) for v in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
