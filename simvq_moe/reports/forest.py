"""The forest plot: paired differences to the baseline with their intervals, arms as rows."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simvq_moe.analysis.results import GroupResult, Paired
from simvq_moe.records.catalogue import directed, metric
from simvq_moe.reports import plots

PANELS = 3
"""Outcomes side by side, at most."""
BETTER, WORSE, UNCLEAR = plots.ARM_COLOURS[3], plots.ARM_COLOURS[2], plots.ARM_COLOURS[0]
LONGEST_LABEL = 60
"""Characters of an arm's name in a line."""


def outcomes_of(group: GroupResult) -> list[str]:
    """The outcomes that are drawn: those of primary tests first, then errors, then the others."""
    order = [*group.primary.values(), *group.errors, *group.outcomes]
    drawn = {pair.metric for pair in group.paired if pair.n}
    return [name for name in dict.fromkeys(order) if name in drawn][:PANELS]


def forest_figure(group: GroupResult) -> str:
    """Differences to the baseline as SVG, a panel an outcome; "" where nothing is paired.

    A point is the mean over paired seeds, its line the 95 % interval; where there are too few for
    an interval the single differences are drawn. Green: better by the whole interval; orange:
    worse.
    """
    names, baseline = outcomes_of(group), group.baseline_arm
    arms = [arm for arm in group.arms if not arm.baseline and arm.n]
    if not names or not arms or baseline is None:
        return ""
    with plots.drawing():
        figure = Figure(figsize=(9.4, 0.9 + 0.27 * len(arms)), layout="constrained")
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            pairs = {pair.arm: pair for pair in group.paired if pair.metric == name and pair.n}
            _draw_panel(axes, [pairs.get(arm.name) for arm in arms], name)
        labels = [plots.cut(arm.label, 1, LONGEST_LABEL) for arm in arms]
        panels[0].set_yticks(range(len(arms)), labels, parse_math=False)
        panels[0].set_ylim(len(arms) - 0.5, -0.5)
        for label, arm in zip(panels[0].get_yticklabels(), arms, strict=True):
            label.set_style("italic" if arm.control else "normal")
        about = f"Differences to {baseline.label} with 95 % intervals, arm by arm"
        return plots.svg(figure, about)


def _draw_panel(axes: Axes, pairs: Sequence[Paired | None], name: str) -> None:
    axes.axvline(0, color=plots.INK, linewidth=0.9)
    for row, pair in enumerate(pairs):
        if pair is None:
            continue
        colour = _colour(pair)
        if pair.interval:
            axes.plot(pair.interval, (row, row), color=colour, linewidth=2)
        else:
            each = [d for d in pair.differences if d is not None]
            axes.plot(each, [row] * len(each), "|", color=colour, markersize=7)
        axes.plot([pair.mean], [row], "o", color=colour, markersize=4.5)
    axes.set_title(directed(name), fontsize=10.5, loc="left", color=plots.INK, parse_math=False)
    axes.grid(axis="both", color=plots.INK, alpha=0.12, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    if metric(name).is_share:
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:+.0f}")


def _colour(pair: Paired) -> str:
    better = metric(pair.metric).better
    if pair.interval is None or better is None or pair.interval[0] <= 0 <= pair.interval[1]:
        return UNCLEAR
    return BETTER if (pair.mean > 0) == (better == "higher") else WORSE
