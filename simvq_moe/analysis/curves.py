"""What the figures draw: metrics over steps, loads of experts, sorted load profiles of codes.

Kept as numbers, thinned to what a figure can show, so that report.json can redraw every figure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from simvq_moe.analysis.arms import Arm, Group, RunRecord
from simvq_moe.core.usage import usage
from simvq_moe.records.catalogue import HELD_OUT, charted, compared_leaves, names

POINTS = 160
"""Most points of a line: more than the pixels of a small figure tell apart."""
NULL_SAMPLES = 16

Series = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Line:
    """One run's values over steps."""

    seed: int
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Curve:
    """One metric of one arm over steps."""

    metric: str
    arm: str
    steps: list[int]
    mean: list[float]
    """Mean over runs at the steps that all of them logged; unfinished runs don't cut it short."""
    runs: list[Line]


@dataclass(frozen=True)
class Loads:
    """Load N f_i of each expert on the held-out set, [layer][expert]: 1 is the fair share."""

    arm: str
    seed: int
    layers: list[list[float]]


@dataclass(frozen=True)
class Profile:
    """Loads N f_i from the most to the least used slot, at some of the ranks; of experts the mean
    over layers of each rank's load."""

    arm: str
    """Empty for the uniform null."""
    seed: int
    slots: int
    ranks: list[int]
    loads: list[float]


def curves_of(group: Group, kind: str | None) -> list[Curve]:
    """Held-out error and usage, training loss and the shared maps, of every arm."""
    curves: list[Curve] = []
    for name in dict.fromkeys([n for n in group.outcomes if n.count("/") == 1]):
        curves += _curves(group, name, _logged(name))
    if kind:
        for leaf in compared_leaves():
            held_out = HELD_OUT[kind] + leaf
            training = held_out.removeprefix("val/")
            # a single evaluation draws no curve; then the windows of training do
            several = any(len(r.series(held_out)[0]) > 1 for a in group.arms for r in a.runs)
            name = held_out if several else training
            curves += _curves(group, name, _logged(name))
    for name in names("curve"):
        curves += _curves(group, name, _logged(name))
    curves += _saturations(group)
    for one in (*charted("maps"), *charted("moves")):
        leaf = one.leaf
        kinds = {kind for a in group.arms for r in a.runs for kind in r.bank_metrics(leaf)}
        for kind in sorted(kinds):
            found = _curves(group, f"bank/{kind}/{leaf}", _mean_of_banks(kind, leaf))
            curves += [c for c in found if any(c.mean) or "moves" not in one.charts]
    return curves


def _saturations(group: Group) -> list[Curve]:
    """Share of the final experts that tokens of the probe have at each evaluation before it."""
    start = HELD_OUT["experts"] + "saturation_at/"

    def series(run: RunRecord) -> Series:
        names = ((re.fullmatch(f"{start}([0-9]{{1,15}})", n), v) for n, v in run.final.items())
        found = {int(match[1]): v for match, v in names if match and math.isfinite(v)}
        return np.array(sorted(found)), np.array([found[step] for step in sorted(found)])

    return _curves(group, start.rstrip("/"), series)


def loads_of(group: Group) -> list[Loads]:
    """Held-out loads of each arm's first run that has counts."""
    found = []
    for arm in group.arms:
        run = first_counted(arm)
        layers = [row for row in run.layer_counts() if row.sum()] if run else []
        layers = [row for row in layers if len(row) == len(layers[0])]  # of one picture
        if run and layers:
            found.append(Loads(arm.name, run.seed, [_short(len(n) * n / n.sum()) for n in layers]))
    return found


def profiles_of(group: Group) -> list[Profile]:
    """Sorted loads of each arm's first run that has counts, and of the uniform null."""
    found: list[Profile] = []
    nulls: dict[tuple[int, int], Profile] = {}
    for arm in group.arms:
        run = first_counted(arm)
        layers = [counts for counts in run.layer_counts() if counts.sum()] if run else []
        if run is None or not layers:
            continue
        experts = run.layers[0]["kind"] == "experts" and len({len(c) for c in layers}) == 1
        for counts in [_mean_of_ranks(layers)] if experts else layers:
            found.append(_profile(arm.name, run.seed, counts))
        for counts in layers:
            key = (len(counts), int(counts.sum()))
            if key not in nulls:
                nulls[key] = _null_profile(*key)
    return found + list(nulls.values())


def _mean_of_ranks(layers: Sequence[np.ndarray]) -> np.ndarray:
    return np.mean([np.sort(counts / counts.sum())[::-1] for counts in layers], axis=0)


def first_counted(arm: Arm) -> RunRecord | None:
    """The finished run with the lowest seed; without one, any run that has counts."""
    counted = [run for run in arm.runs if run.held_out_counts is not None]
    ended = [run for run in counted if run.status == "finished"]
    return next(iter(ended or counted), None)


def _logged(name: str) -> Callable[[RunRecord], Series]:
    def series(run: RunRecord) -> Series:
        steps, values = run.series(name)
        leaf = name.rsplit("/", 1)[-1]
        if len(steps) or leaf not in compared_leaves() or not name.startswith("val/"):
            return steps, values
        return _counted(run, leaf)

    return series


def _counted(run: RunRecord, leaf: str) -> Series:
    """The last evaluation's usage, from its counts: one point, for runs that log no measure."""
    layers = [usage(row).as_dict()[leaf] for row in run.layer_counts() if row.sum()]
    empty = np.empty(0)
    return (np.array([run.step]), np.array([np.mean(layers)])) if layers else (empty, empty)


def _mean_of_banks(kind: str, leaf: str) -> Callable[[RunRecord], Series]:
    """Mean over the banks of one kind, at each step over those that are logged: one whose slots
    were all drawn logs no idle movement."""

    def series(run: RunRecord) -> Series:
        logged: dict[float, list[float]] = {}
        for name in run.bank_metrics(leaf).get(kind, ()):
            for step, number in zip(*run.series(name), strict=True):
                logged.setdefault(step, []).append(number)
        steps = sorted(logged)
        return np.array(steps), np.array([np.mean(logged[step]) for step in steps])

    return series


def _curves(group: Group, name: str, series: Callable[[RunRecord], Series]) -> list[Curve]:
    curves = []
    for arm in group.arms:
        drawn = [(run, *series(run)) for run in arm.runs]
        drawn = [(run, steps, values) for run, steps, values in drawn if len(steps)]
        if not drawn:
            continue
        ended = [(s, v) for run, s, v in drawn if run.status == "finished"]
        steps, mean = _mean(ended or [(s, v) for _, s, v in drawn])
        curves.append(
            Curve(
                metric=name,
                arm=arm.name,
                steps=_steps(steps),
                mean=_thin(mean),
                runs=[Line(run.seed, _steps(s), _thin(v)) for run, s, v in drawn],
            )
        )
    return curves


def _mean(series: Sequence[Series]) -> Series:
    if not series:
        return np.empty(0), np.empty(0)
    shared = series[0][0]
    for steps, _ in series[1:]:
        shared = np.intersect1d(shared, steps)
    rows = [values[np.isin(steps, shared)] for steps, values in series]
    return shared, np.mean(rows, axis=0)


def _kept(length: int) -> np.ndarray:
    return np.unique(np.linspace(0, length - 1, min(length, POINTS)).round().astype(int))


def _steps(steps: np.ndarray) -> list[int]:
    return [int(step) for step in steps[_kept(len(steps))]] if len(steps) else []


def _thin(values: np.ndarray) -> list[float]:
    return _short(values[_kept(len(values))]) if len(values) else []


def _short(values: np.ndarray) -> list[float]:
    """Five significant digits: more than a figure shows, at a third of the size."""
    return [float(f"{v:.5g}") for v in values]


def _profile(arm: str, seed: int, counts: np.ndarray) -> Profile:
    loads = np.sort(len(counts) * counts / counts.sum())[::-1]
    # evenly in log rank: the head is steep, the tail long
    spaced = np.geomspace(1, len(loads), POINTS).round().astype(int) - 1
    even = np.linspace(0, len(loads) - 1, min(len(loads), POINTS)).round().astype(int)
    last_used = int((loads > 0).sum()) - 1
    ranks = np.unique(np.concatenate([spaced, even, [last_used]]))
    return Profile(arm, seed, len(counts), [int(r) + 1 for r in ranks], _short(loads[ranks]))


def _null_profile(slots: int, draws: int) -> Profile:
    """The expected profile of uniform draws: sorted samples, averaged rank by rank."""
    samples = np.random.default_rng(0).multinomial(
        draws, np.full(slots, 1 / slots), size=NULL_SAMPLES
    )
    return _profile("", 0, np.sort(samples, axis=1).mean(axis=0))
