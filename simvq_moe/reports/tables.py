"""The tables of a report, once, for the page, for Markdown and for the terminal.

A cell has what is read first (mean and spread) and what is read beneath it (every single value).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from markupsafe import Markup

from simvq_moe import text_table
from simvq_moe.analysis.results import (
    ArmResult,
    GroupResult,
    Null,
    Paired,
    Results,
    RunResult,
)
from simvq_moe.analysis.stats import LEAST_PAIRS_INTERVAL
from simvq_moe.records.catalogue import (
    OF_TASKS,
    directed,
    label,
    metric,
    names,
    router_leaves,
    usage_leaves,
)
from simvq_moe.records.printing import (
    MISSING,
    difference,
    mean_and_sd,
    number,
    percent,
    probability,
    unit,
)

SECONDS = "time/train_s"
NULL_LABEL = "uniform chance"
SEPARATOR = "\u00a0· "
"""Between the values of seeds; it stays on the line of the value before it."""


@dataclass(frozen=True)
class Cell:
    """One cell; `beneath` is printed smaller."""

    text: str
    beneath: str = ""
    best: bool = False
    """Whether no other arm is better: it is printed bold."""


@dataclass(frozen=True)
class Row:
    """One line of a table; the first cell names it."""

    cells: list[Cell]
    kind: str = ""
    """baseline, control, null or nothing: how the page marks it."""


@dataclass(frozen=True)
class Table:
    """Header and rows."""

    header: list[str]
    rows: list[Row]


def result_table(group: GroupResult, chart: Literal["table", "overview"] = "table") -> Table:
    """Arms with held-out error, usage and time, and the uniform null as the last line.

    Args:
        chart: where it is shown, which says what measures of usage it has.
    """
    columns = usage_leaves(chart)
    header = ["arm", "runs", *(directed(name) for name in group.errors)]
    slots = {null.slots for null in group.null}
    header += [
        f"{label(group.metric(name))} of {next(iter(slots)):,} ↑"
        if name == "perplexity" and len(slots) == 1
        else directed(group.metric(name))
        for name in columns
        if group.kind
    ]
    header.append("seconds")
    rows = [_arm_row(group, arm, columns) for arm in group.arms]
    rows += [_null_row(group, null, columns) for null in group.null]
    return Table(header, rows)


def _arm_row(group: GroupResult, arm: ArmResult, columns: Sequence[str]) -> Row:
    cells = [
        Cell(arm.label, "baseline" if arm.baseline else "control" if arm.control else ""),
        Cell(str(arm.n) if arm.n == len(arm.status) else f"{arm.n} of {len(arm.status)}"),
    ]
    cells += [_value_cell(arm, name, group) for name in group.errors]
    if group.kind:
        for name in columns:
            cell = _value_cell(arm, group.metric(name), group)
            if name == "perplexity" and len(group.null) > 1:
                cell = replace(cell, text=cell.text + _of_slots(group, arm.name))
            cells.append(cell)
    cells.append(_value_cell(arm, SECONDS))
    return Row(cells, "baseline" if arm.baseline else "control" if arm.control else "")


def _value_cell(arm: ArmResult, name: str, group: GroupResult | None = None) -> Cell:
    """Mean ± sd, and beneath it the value of every seed when there are several.

    Args:
        group: its arms are compared, and the best is marked.
    """
    values = arm.values.get(name, [])
    if not any(v is not None for v in values):
        return Cell(MISSING)
    mean = arm.mean[name]
    each = [number(name, v, like=mean).removesuffix(" %") for v in values]
    beneath = SEPARATOR.join(each) if len(each) > 1 else ""
    best = group is not None and number(name, mean) == best_of(group, name)
    return Cell(mean_and_sd(name, mean, arm.sd[name]), beneath, best)


def best_of(group: GroupResult, name: str) -> str | None:
    """The best mean of a measure over all arms, as it is printed; None: there is no best, or all
    arms are alike."""
    means = [a.mean[name] for a in group.arms if math.isfinite(a.mean.get(name, math.nan))]
    better = metric(name).better
    if better is None or len({number(name, mean) for mean in means}) < 2:
        return None
    return number(name, (max if better == "higher" else min)(means))


def best_arms(group: GroupResult) -> str:
    """One line that names the best arm in each outcome, controls and baseline included."""
    parts = []
    for name in group.outcomes:
        best = best_of(group, name)
        arms = [a.label for a in group.arms if best and number(name, a.mean.get(name)) == best]
        parts += [f"{label(name)} {best}, {' and '.join(arms)}"] if arms else []
    return f"Best of all arms, controls included: {'; '.join(parts)}." if parts else ""


def definitions(names: Sequence[str], said: set[str]) -> list[tuple[str, str]]:
    """What each measure is called, with an arrow to where it is better, and what it means; those
    that were said before are left out, and noted."""
    new = [
        name for name in dict.fromkeys(names) if metric(name).meaning and label(name) not in said
    ]
    said |= {label(name) for name in new}
    return [(directed(name), metric(name).meaning) for name in new]


def measures_of(group: GroupResult) -> list[str]:
    """The measures of the result table, in the order of its columns."""
    usage = [group.metric(leaf) for leaf in usage_leaves("table")] if group.kind else []
    return [*group.errors, *usage]


def _of_slots(group: GroupResult, arm: str) -> str:
    """ " of 512" where arms differ in their number of slots; else the header says it once."""
    return next((f" of {null.slots:,}" for null in group.null if arm in null.arms), "")


def _null_row(group: GroupResult, null: Null, columns: Sequence[str]) -> Row:
    which = "" if len(group.null) == 1 else f" ({null.slots:,} slots, {null.draws:,} draws)"
    cells = [Cell(NULL_LABEL + which, "the null"), Cell(""), *(Cell("") for _ in group.errors)]
    cells += [Cell(number(group.metric(name), null.values[group.metric(name)])) for name in columns]
    return Row([*cells, Cell("")], "null")


def window_note(group: GroupResult) -> list[str]:
    """What was counted, and how far even chance would get with so few draws."""
    notes = []
    for null in group.null:
        note = (
            f"Usage over {null.tokens:,} held-out tokens x {null.top_k} choice"
            f"{'s' if null.top_k > 1 else ''} = {null.draws:,} draws of {null.slots:,} {group.kind}"
        )
        if group.kind == "experts":
            note += " in each layer, mean over layers"
        if null.ceiling < 0.999:
            share = number(group.metric("used"), null.ceiling)
            note += f"; so few draws can use at most {share} of the slots by even chance"
        notes.append(f"{note}.")
    return notes


def router_table(group: GroupResult) -> Table:
    """What the routers do with the probe's tokens, where anything was recorded."""
    table = _measured_table(group, [group.metric(name) for name in router_leaves("routers")])
    return table if len(table.header) > 1 else Table(table.header, [])


def task_table(group: GroupResult) -> Table:
    """What tasks of lm-eval say of each arm, where any was run."""
    measured = {name for arm in group.arms for name in arm.values if name.startswith(OF_TASKS)}
    table = _measured_table(group, sorted(measured))
    return table if len(table.header) > 1 else Table(table.header, [])


def task_tables(groups: Sequence[GroupResult]) -> list[tuple[GroupResult, Table]]:
    """The groups in which a task was run, each with its table."""
    every = [(group, task_table(group)) for group in groups]
    return [(group, table) for group, table in every if table.rows]


def _measured_table(group: GroupResult, metrics: Sequence[str]) -> Table:
    """A column for each metric that any run of the group has."""
    found = [
        n for n in metrics if any(v is not None for a in group.arms for v in a.values.get(n, []))
    ]
    rows = [
        Row([Cell(arm.label), *(_value_cell(arm, name) for name in found)]) for arm in group.arms
    ]
    return Table(["arm", *(label(name) for name in found)], rows)


def paired_table(group: GroupResult, primary: bool | None = None) -> Table:
    """Each arm minus the baseline, over paired seeds; only what is primary, or only what is not."""
    pairs = [pair for pair in group.paired if primary is None or pair.primary == primary]
    margins = sorted({pair.margin for pair in pairs if pair.margin is not None})
    header = ["metric, arm", "difference ± sd", "relative", "95 % interval"]
    header += ["n", "p", "p at best", "p Holm"]
    if margins:
        header.append(f"p equivalent (± {', '.join(map(str, margins))})")
    labels = {arm.name: arm.label for arm in group.arms}
    rows = [_paired_row(pair, labels[pair.arm], bool(margins)) for pair in pairs]
    return Table(header, rows)


def interval(name: str, interval: tuple[float, float] | None, like: float, n: int) -> str:
    if interval is None:
        return "n too small" if n < LEAST_PAIRS_INTERVAL else "all equal"
    return " to ".join(difference(name, end, like=like) for end in interval)


def _paired_row(pair: Paired, arm: str, equivalence: bool) -> Row:
    name, like = pair.metric, pair.mean
    each = [difference(name, d, like=like) for d in pair.differences]
    spread = number(name, pair.sd, like=like).removesuffix(" %")
    mean = difference(name, like) + (f" ± {spread}" if pair.n > 1 else "") + unit(name)
    share = unit(name) != ""
    return Row(
        [
            Cell(f"{label(name)}, {arm}", "primary" if pair.primary else "secondary"),
            Cell(
                mean if pair.n else MISSING,
                SEPARATOR.join(each) if pair.n and len(each) > 1 else "",
            ),
            Cell(MISSING if share else percent(pair.relative)),
            Cell(interval(name, pair.interval, like, pair.n)),
            Cell(str(pair.n)),
            Cell(probability(pair.p)),
            Cell(probability(pair.p_min)),
            Cell(probability(pair.p_holm)),
            *([Cell(probability(pair.p_equivalent))] if equivalence else []),
        ],
        "" if pair.primary else "secondary",
    )


def unpaired_notes(group: GroupResult) -> list[str]:
    """Seeds that make no pair, with what became of the run on each side."""
    base = group.baseline_arm
    if base is None:
        return []
    notes = []
    for arm in group.arms:
        missing = next((pair.unpaired for pair in group.paired if pair.arm == arm.name), [])
        by_status: dict[tuple[str, str], list[int]] = {}
        for seed in missing:
            i = group.seeds.index(seed)
            by_status.setdefault((arm.status[i], base.status[i]), []).append(seed)
        parts = [
            f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))} "
            f"({of_arm}; {base.label} {of_base})"
            for (of_arm, of_base), seeds in by_status.items()
        ]
        if parts:
            notes.append(f"No pair for {arm.label} at {', '.join(parts)}.")
    return notes


def cost_table(group: GroupResult) -> Table:
    """What each arm took."""
    return _measured_table(group, names("costs"))


def config_table(group: GroupResult) -> Table:
    """Every config key in which an arm differs from the baseline."""
    rows = [
        Row([Cell(arm.label), Cell(key), Cell(_plain(old)), Cell(_plain(new))])
        for arm in group.arms
        for key, (old, new) in arm.differs.items()
    ]
    return Table(["arm", "key", "baseline", "here"], rows)


def unfinished_table(results: Results) -> Table:
    """Runs that are not in the means: failed, interrupted, running, pending or missing."""
    rows = [
        Row(
            [
                Cell(f"{run.group} / {_label(results, run)}" if run.group else run.path),
                Cell(str(run.seed)),
                Cell(run.status),
                Cell(f"{run.step:,}"),
                Cell(
                    ", ".join(f"{label(k)} {number(k, v)}" for k, v in run.last.items()) or MISSING
                ),
                Cell(" ".join((run.error or MISSING).split())),
            ]
        )
        for run in results.runs
        if run.status != "finished"
    ]
    return Table(["run", "seed", "status", "last step", "last evaluation", "error"], rows)


def _label(results: Results, run: RunResult) -> str:
    group = next(group for group in results.groups if group.name == run.group)
    return next((arm.label for arm in group.arms if arm.name == run.arm), run.arm)


def markdown(table: Table) -> Markup:
    """A Markdown table with aligned columns."""

    def text(cell: Cell) -> str:
        above, beneath = markdown_text(cell.text), markdown_text(cell.beneath)
        above = f"**{above}**" if cell.best else above
        return f"{above}<br><sub>{beneath}</sub>" if beneath else above

    return Markup(_aligned(table, text))


def plain_text(table: Table) -> str:
    """The same for the terminal, without what stands beneath."""
    return _aligned(table, lambda cell: cell.text)


def _aligned(table: Table, text: Callable[[Cell], str]) -> str:
    header = [text(Cell(name)) for name in table.header]
    return text_table.markdown(
        [header, *([text(cell) for cell in row.cells] for row in table.rows)]
    )


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, whoever wrote it: no link, picture, element or table of
    its own. What is marked safe stays."""
    if isinstance(text, Markup):
        return text
    text = re.sub(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
    # a "<" before a space opens nothing
    return re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", re.sub(r"&(?=[a-zA-Z#])", "&amp;", text))


def markdown_line(value: object) -> object:
    """The same of text that may begin a line: no heading, quote or list of its own."""
    if not isinstance(value, str):
        return value
    return re.sub(r"^[#>+=-]", r"\\\g<0>", markdown_text(value))


def code_block(lines: Sequence[str]) -> Markup:
    """Lines as they are, between fences longer than any that they hold."""
    text = "\n".join(lines)
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}\n{text}\n{fence}")


def _plain(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return str(value)
