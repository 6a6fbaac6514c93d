"""Figures as inline SVG that takes its colours from the page, so that light and dark both work.

Matplotlib draws with placeholder colours; each becomes a CSS variable of the page (`--ink`,
`--arm-0` ...). Text stays text. Heat maps are small rasters inside the SVG. A figure is narrow
enough for a phone and the page sets them side by side.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simvq_moe.analysis.curves import Curve, Loads, Profile
from simvq_moe.analysis.routings import RoutingOf
from simvq_moe.analysis.spectra import Spectrum
from simvq_moe.records.catalogue import directed, label, metric

INK = "#010203"
ARM_COLOURS = (
    "#333331",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#aa4499",
    "#e69f00",
    "#56b4e9",
    "#882255",
    "#999933",
)
"""Placeholders; the first, neutral one is the baseline's. The rest is Okabe and Ito's palette,
told apart with any colour vision, and two of Paul Tol's."""
WIDTH = 4.6
LONGEST_TITLE = 50
"""Characters of a line."""
TITLE_LINES = 3
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
}
FILE = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'style="background: white" '
)
"""How the element begins where it is a file."""
SKIPPED_START = 0.05
"""Share of the steps at the start whose losses don't widen the axis."""


@dataclass(frozen=True)
class ArmStyle:
    """How an arm is drawn in every figure of its group."""

    label: str
    colour: int
    """Index of its colour, on the page and here."""
    dashed: bool
    """Controls are."""
    dotted: bool = False
    """Arms beyond the number of colours."""

    @property
    def line(self) -> str:
        if self.dashed:
            return "--"
        return "-." if self.dotted else "-"


def arm_styles(arms: Sequence[tuple[str, str, bool, bool]]) -> dict[str, ArmStyle]:
    """Styles of (name, label, control, baseline): the baseline is neutral, others in order."""
    styles: dict[str, ArmStyle] = {}
    colours, used = len(ARM_COLOURS) - 1, 0
    for name, text, control, baseline in arms:
        colour = 0 if baseline else 1 + used % colours
        styles[name] = ArmStyle(text, colour, control, dotted=used >= colours)
        used += not baseline
    return styles


def curve_figure(
    curves: Sequence[Curve], styles: Mapping[str, ArmStyle], null: float | None = None
) -> str:
    """One metric over steps: a line is an arm's mean, its band spans the seeds."""
    name = curves[0].metric
    with drawing():
        figure, axes = _panel(directed(name), height=2.9)
        for curve in curves:
            style = styles[curve.arm]
            colour = ARM_COLOURS[style.colour]
            marker = "o" if len(curve.steps) < 3 else None
            _spread(axes, curve, colour)
            axes.plot(
                curve.steps,
                curve.mean,
                color=colour,
                linewidth=1.8,
                linestyle=style.line,
                marker=marker,
                markersize=4,
            )
        if null is not None:
            axes.axhline(null, color=INK, linewidth=0.9, linestyle=":")
        _frame(axes, curves, name)
        axes.set_xlabel("step")
        return svg(figure, f"{label(name)} over steps")


def _spread(axes: Axes, curve: Curve, colour: str) -> None:
    """Fill from the lowest to the highest seed; draw lines where steps of seeds differ."""
    if len(curve.runs) < 2:
        return
    if all(run.steps == curve.steps for run in curve.runs):
        values = np.array([run.values for run in curve.runs])
        span = values.min(0), values.max(0)
        axes.fill_between(curve.steps, *span, color=colour, alpha=0.13, linewidth=0)
        return
    for run in curve.runs:
        axes.plot(run.steps, run.values, color=colour, linewidth=0.7, alpha=0.45)


def heat_figure(loads: Loads, text: str, largest: float) -> str:
    """Layer x expert loads, as numbered and sorted in each layer, on a scale up to `largest`."""
    layers = np.array(loads.layers)
    rows = min(2.2, max(0.55, 0.16 * len(layers)))
    with drawing():
        figure = Figure(figsize=(WIDTH, 1.25 + 2 * rows), layout="constrained")
        _title(figure, text)
        panels = figure.subplots(2, 1)
        top = max(largest, 1.5)
        norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=top)
        image = None
        for axes, values, axis in (
            (panels[0], layers, "expert"),
            (panels[1], -np.sort(-layers, axis=1), "expert, sorted in each layer"),
        ):
            image = axes.imshow(
                values, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="none"
            )
            axes.set_xlabel(axis)
            axes.set_ylabel("layer")
            axes.yaxis.set_major_locator(MaxNLocator(nbins=min(4, len(layers)), integer=True))
        assert image is not None
        ticks = sorted({0.0, 0.5, 1.0, round((1 + top) / 2, 1), round(top, 1)})
        bar = figure.colorbar(image, ax=list(panels), ticks=ticks, pad=0.02, shrink=0.9)
        bar.set_label("load (1 is fair)")
        return svg(figure, f"Expert loads of {text}")


def routing_figure(routing: RoutingOf, text: str, largest: tuple[float, float]) -> str:
    """Experts by experts and domains by experts, each up to a common largest multiple of chance."""
    tables = [
        (routing.co_activation, "expert", "with expert", largest[0]),
        (routing.specialization, "domain", "expert", largest[1]),
    ]
    tables = [table for table in tables if table[0]]
    heights = [2.6 if name == "expert" else 0.9 for _, name, _, _ in tables]
    with drawing():
        figure = Figure(
            figsize=(WIDTH, 0.7 + sum(heights) + 0.5 * len(tables)), layout="constrained"
        )
        _title(figure, text)
        panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (values, name, across, top) in zip(panels, tables, strict=True):
            norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=max(top, 1.5))
            image = axes.imshow(
                np.array(values), aspect="auto", cmap="RdBu_r", norm=norm, interpolation="none"
            )
            axes.set_xlabel(across)
            axes.set_ylabel(name)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
            bar = figure.colorbar(image, ax=axes, ticks=[0, 1, round(max(top, 1.5), 1)], pad=0.02)
            bar.set_label("1 is chance")
        return svg(figure, f"Co-activation and domains of {text}")


def profile_figure(profiles: Sequence[Profile], styles: Mapping[str, ArmStyle], slots: str) -> str:
    """Loads from the most to the least used; a line falls where the dead slots begin."""
    with drawing():
        figure, axes = _panel(f"load of {slots} (1 is fair)", height=3.3)
        for profile in profiles:
            share = 100 * np.array(profile.ranks) / profile.slots
            if profile.arm:
                style = styles[profile.arm]
                colour, line, width = ARM_COLOURS[style.colour], style.line, 1.8
            else:
                colour, line, width = INK, ":", 1.1
            axes.plot(share, profile.loads, color=colour, linestyle=line, linewidth=width)
        axes.set_yscale("log", nonpositive="clip")
        positive = [load for p in profiles for load in p.loads if load > 0]
        if positive:
            axes.set_ylim(min(positive) / 2, max(positive) * 2)
        axes.set_xlim(0, 100)
        axes.set_xlabel(f"{slots}, from the most used (%)")
        return svg(figure, f"Sorted loads of {slots}")


def spectrum_figure(spectra: Sequence[Spectrum], styles: Mapping[str, ArmStyle]) -> str:
    """Singular values of the maps of one kind, from the largest, which is 1; bands span seeds."""
    text = f"singular values of W over the largest, {spectra[0].kind}"
    with drawing():
        figure, axes = _panel(text, height=2.9)
        for one in spectra:
            style = styles[one.arm]
            colour = ARM_COLOURS[style.colour]
            axes.fill_between(one.ranks, one.lowest, one.highest, color=colour, alpha=0.13, lw=0)
            axes.plot(one.ranks, one.values, color=colour, linewidth=1.8, linestyle=style.line)
        axes.set_yscale("log", nonpositive="clip")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlabel("number, from the largest")
        return svg(figure, text)


@contextmanager
def drawing() -> Iterator[None]:
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # the page has fonts for what matplotlib's own font lacks
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def _panel(title: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(
        cut(title, 1, 2 * LONGEST_TITLE), fontsize=10.5, loc="left", color=INK, parse_math=False
    )
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    return figure, axes


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(
        cut(text, TITLE_LINES), fontsize=10.5, color=INK, x=0.02, ha="left", parse_math=False
    )


def cut(text: str, lines: int, width: int = LONGEST_TITLE) -> str:
    """Text in so many lines of so many characters: names may be of any length, the figure stays."""
    return textwrap.fill(text, width, max_lines=lines, placeholder="…")


def _frame(axes: Axes, curves: Sequence[Curve], name: str) -> None:
    """Axis limits: the falling edge of a loss at the start would flatten all that follows."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    one = metric(name)
    if one.log:
        axes.set_yscale("log")
    elif one.better == "lower" and name.count("/") == 1:
        runs = [run for curve in curves for run in curve.runs]
        late = [
            v
            for run in runs
            for s, v in zip(run.steps, run.values, strict=True)
            if s >= SKIPPED_START * run.steps[-1]
        ]
        margin = 0.05 * (max(late) - min(late)) or 0.05 * abs(max(late)) or 1.0
        axes.set_ylim(min(late) - margin, max(late) + margin)
    elif one.is_share:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def as_file(svg: str) -> str:
    """A figure of the page as a file of its own: in the placeholders' colours, on white."""
    for i, colour in enumerate(ARM_COLOURS):
        svg = svg.replace(f"var(--arm-{i})", colour)
    return svg.replace("var(--ink)", INK).replace("<svg ", FILE, 1)


def svg(figure: Figure, description: str) -> str:
    """The figure as an element of a page: no header, no fixed size, colours by variable."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    for i, colour in enumerate(ARM_COLOURS):
        svg = svg.replace(colour, f"var(--arm-{i})")
    svg = svg.replace(INK, "var(--ink)")
    escaped = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escaped}" ', 1)
