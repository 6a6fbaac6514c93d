"""The report: one page that answers each question first and then shows all it rests on.

report.html needs nothing but itself, report.json has every number of it, report.md the tables and,
in files forest-1.svg and so on beside it, the paired differences of each question.
Runs that are still going, failed or never started are named, not left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from simvq_moe.analysis.comparison import compute
from simvq_moe.analysis.curves import Curve
from simvq_moe.analysis.results import GroupResult, Results
from simvq_moe.analysis.run_folders import Group, find
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import write_atomically
from simvq_moe.reports import plots, predicted, tables
from simvq_moe.reports.forest import forest_figure, outcomes_of
from simvq_moe.reports.plots import ArmStyle
from simvq_moe.reports.samples import Sample, sample_of


@dataclass(frozen=True)
class Report:
    """Where a report was written, and the table to print where it was asked for."""

    html: Path
    json: Path
    markdown: Path
    table: str
    """Verdicts and result tables as plain text (Markdown)."""


@dataclass(frozen=True)
class Figures:
    """Everything drawn for one group."""

    group: GroupResult
    styles: dict[str, ArmStyle]
    forest: Markup
    """Paired differences; empty where there are none."""
    forest_outcomes: list[str]
    curves: list[Markup]
    curve_arms: list[str]
    heat_maps: list[Markup]
    profiles: list[Markup]
    banks: list[Markup]
    bank_arms: list[str]
    routings: list[Markup]
    samples: list[Sample]


def report(paths: Sequence[Path], out: Path, baseline: str | None = None) -> Report:
    """Write report.html, report.json and report.md about the runs in the paths.

    Args:
        paths: run directories, sweep directories, or folders of either.
        out: folder of the three files; made if need be.
        baseline: arm that runs without a sweep are compared with; see `find`.

    Raises:
        ConfigError: a path does not exist or holds no run that can be read, no run is the
            baseline's, or `out` is no folder that can be written to.
    """
    found = find(paths, baseline)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: give a folder")
    results = compute(found.groups, out, found.broken)
    figures = [_draw(g, r) for g, r in zip(found.groups, results.groups, strict=True)]
    try:
        return _write(out, results, figures)
    except OSError as error:
        raise ConfigError(f"--out {out} can't be written to: {error.strerror}") from None


def _write(out: Path, results: Results, figures: Sequence[Figures]) -> Report:
    out.mkdir(parents=True, exist_ok=True)
    written = Report(
        html=out / "report.html",
        json=out / "report.json",
        markdown=out / "report.md",
        table=_terminal_text(results),
    )
    write_atomically(written.json, json.dumps(results.as_json(), allow_nan=False))
    for i, drawn in enumerate(figures, start=1):
        if drawn.forest:
            write_atomically(out / f"forest-{i}.svg", plots.as_file(str(drawn.forest)))
    write_atomically(written.markdown, _render("report.md.j2", results, []))
    write_atomically(written.html, _render("report.html.j2", results, figures))
    return written


def _render(template: str, results: Results, figures: Sequence[Figures]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.j2"),
        finalize=None if template.endswith(".html.j2") else tables.markdown_line,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    unfinished = tables.unfinished_table(results)
    return environment.get_template(template).render(
        results=results,
        figures=figures,
        tables=tables,
        predicted=predicted,
        said=set(),
        drawn=[g.name for g in results.groups if outcomes_of(g)],
        unfinished=unfinished,
        environments=_environments(results),
    )


def _environments(results: Results) -> list[dict[str, str]]:
    """The distinct places that the runs ran in: one, if all is well."""
    distinct: list[dict[str, str]] = []
    for run in results.runs:
        if run.environment and run.environment not in distinct:
            distinct.append(run.environment)
    return distinct


def _terminal_text(results: Results) -> str:
    """Verdict and the main columns of each group; all else is in the files."""
    parts = []
    for group in results.groups:
        table = tables.result_table(group, "overview")
        parts += [f"{group.name}: {group.question}"]
        parts += [f"Warning: {sentence}" for sentence in group.warnings] + group.verdict
        parts += [best] if (best := tables.best_arms(group)) else []
        parts += [tables.plain_text(table), ""]
    tested = [one for one in results.predictions if one.evidence]
    parts += [f"{one.name} {predicted.judged(one)}: {one.statement}" for one in tested]
    parts += [""] * bool(tested)
    unfinished = tables.unfinished_table(results)
    if unfinished.rows:
        parts += ["Not finished, and in no mean:", tables.plain_text(unfinished)]
    if left_out := [line for group in results.groups for line in group.left_out]:
        parts += ["Left out, because it can't be read:", *left_out]
    return "\n".join(parts).rstrip()


def _draw(group: Group, result: GroupResult) -> Figures:
    styles = plots.arm_styles([(a.name, a.label, a.control, a.baseline) for a in result.arms])
    banks = [curve for curve in result.curves if curve.metric.startswith("bank/")]
    others = [curve for curve in result.curves if not curve.metric.startswith("bank/")]
    nulls = result.null[0].values if len(result.null) == 1 else {}
    labels = {arm.name: arm.label for arm in result.arms}
    largest = max((max(row) for loads in result.loads for row in loads.layers), default=1.0)
    return Figures(
        group=result,
        styles=styles,
        forest=Markup(forest_figure(result)),
        forest_outcomes=outcomes_of(result),
        curve_arms=list(dict.fromkeys(curve.arm for curve in others)),
        curves=[
            Markup(plots.curve_figure(curves, styles, nulls.get(curves[0].metric)))
            for curves in _by_metric(others)
        ],
        heat_maps=[
            Markup(plots.heat_figure(loads, f"{labels[loads.arm]}, seed {loads.seed}", largest))
            for loads in result.loads
        ],
        profiles=[
            Markup(plots.profile_figure(result.profiles, styles, result.kind or "slots"))
            for _ in result.profiles[:1]
        ],
        banks=[
            *(Markup(plots.curve_figure(curves, styles)) for curves in _by_metric(banks)),
            *_spectrum_figures(result, styles),
        ],
        bank_arms=list(dict.fromkeys(curve.arm for curve in banks)),
        routings=_routing_figures(result, labels),
        samples=[s for arm in group.arms if (s := sample_of(arm, result.left_out))],
    )


def _routing_figures(result: GroupResult, labels: dict[str, str]) -> list[Markup]:
    """One scale for all arms, so that they can be compared."""

    def largest(tables: Iterable[list[list[float]]]) -> float:
        return max((v for table in tables for row in table for v in row), default=1.0)

    scale = (
        largest(routing.co_activation for routing in result.routings),
        largest(routing.specialization for routing in result.routings),
    )
    return [
        Markup(plots.routing_figure(r, f"{labels[r.arm]}, seed {r.seed}, layer {r.layer}", scale))
        for r in result.routings
        if r.co_activation or r.specialization
    ]


def _spectrum_figures(result: GroupResult, styles: dict[str, ArmStyle]) -> list[Markup]:
    kinds = dict.fromkeys(spectrum.kind for spectrum in result.spectra)
    return [
        Markup(plots.spectrum_figure([s for s in result.spectra if s.kind == kind], styles))
        for kind in kinds
    ]


def _by_metric(curves: Sequence[Curve]) -> list[list[Curve]]:
    metrics = dict.fromkeys(curve.metric for curve in curves)
    return [[curve for curve in curves if curve.metric == metric] for metric in metrics]
