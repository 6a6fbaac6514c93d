"""What became of registered predictions, for the page, for Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from simvq_moe.analysis.results import Evidence, Prediction, Results
from simvq_moe.records.printing import MISSING, difference, number, probability, unit
from simvq_moe.reports.tables import SEPARATOR, Cell, Row, Table, interval


def predictions_table(predictions: Sequence[Prediction]) -> Table:
    """Every case of the predictions that could be tested, with the numbers that decide."""
    header = ["prediction", "verdict", "case", "mean", "95 % interval", "n", "p", "p equivalent"]
    rows = []
    for one in predictions:
        for i, found in enumerate(one.evidence):
            cells = (
                [Cell(one.name, one.statement), Cell(judged(one))]
                if not i
                else [Cell(""), Cell("")]
            )
            rows.append(Row(cells + _evidence_cells(found), "" if not i else "more"))
    return Table(header, rows)


def judged(one: Prediction) -> str:
    """The verdict; where the pairs could not decide whatever they say, how many could."""
    if one.pairs_needed:
        return f"needs {one.pairs_needed:,} pairs"
    return one.verdict


def registered_note(one: Prediction) -> str:
    """Whether it stood before the runs, as far as that is recorded."""
    if one.before is None:
        return "No record says whether it was committed before the runs."
    stood = "It was committed before the first run, and unchanged since."
    return stood if one.before else "It was committed, or changed, after the first run had begun."


def registered_table(results: Results) -> Table:
    """What was written down, beside the start of the first run."""
    rows = [
        Row(
            [
                Cell(f"{one.sweep}: {one.file}"),
                Cell(one.commit or "not committed"),
                Cell(one.date or MISSING),
                Cell(one.first_run or MISSING),
                Cell({True: "yes", False: "no", None: "not known"}[one.before]),
            ]
        )
        for one in results.registered
    ]
    return Table(["file", "last commit", "of", "first run", "before the first run"], rows)


def evidence_line(found: Evidence) -> str:
    """ "MaxVio, a minus b: +0.04 (95 % interval −0.02 to +0.09, p 0.313, n = 6)"."""
    name, like = found.metric, found.mean
    parts = []
    if found.interval:
        parts.append(f"95 % interval {interval(name, found.interval, like, found.n)}")
    parts += [f"p {probability(found.p)}"] if found.p is not None else []
    if found.p_equivalent is not None:
        parts.append(f"p of equivalence within {found.margin} {probability(found.p_equivalent)}")
    numbers = ", ".join([*parts, f"n = {found.n}"])
    return f"{found.group}: {found.text}: {_shown(name, like)}{unit(name)} ({numbers})"


def _shown(name: str, value: float, like: float | None = None) -> str:
    """Movements of rows are levels; all other evidence is of differences."""
    return (number if name.startswith("bank/") else difference)(name, value, like=like)


def _evidence_cells(found: Evidence) -> list[Cell]:
    name, like = found.metric, found.mean
    each = SEPARATOR.join(_shown(name, v, like) for v in found.values)
    within = f" (± {found.margin})" if found.margin is not None else ""
    return [
        Cell(found.text, f"{found.group}: {found.verdict}"),
        Cell(_shown(name, like) + unit(name), each if found.n > 1 else ""),
        Cell(interval(name, found.interval, like, found.n)),
        Cell(str(found.n)),
        Cell(probability(found.p)),
        Cell(probability(found.p_equivalent) + within),
    ]
