"""What a sweep wrote down before its runs: stamps of its files and of its predictions' rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simvq_moe.config.recipes import recipe_file
from simvq_moe.files.regular import BrokenFileError
from simvq_moe.runs.history import last_change, shown_name
from simvq_moe.runs.sweep_file import Stamp, read_sweep


def unknown(numbers: Sequence[str]) -> str | None:
    """What is wrong with these numbers of predictions; None: nothing."""
    rules = _rules() if numbers else {}
    for number in numbers:
        if number not in rules:
            return f"{number!r} is none that is registered: use some of {', '.join(rules)}"
    return None


def stamps(files: Sequence[Path], predictions: Sequence[str], folder: Path) -> list[Stamp]:
    """One for each file, and for each earlier state of it in which runs were started.

    Args:
        files: the sweep's YAML files.
        predictions: numbers of the predictions that it registers.
        folder: the sweep's folder; stamps of its sweep.json are kept.
    """
    rules = _rules() if predictions else {}
    rule_files = [rules[number] for number in predictions]
    own = [recipe_file(file) for file in files]
    found = [_stamp(file) for file in dict.fromkeys([*own, *rule_files])]
    try:
        before = read_sweep(folder).registered or []
    except BrokenFileError:  # it is the first time, or the file is written anew
        before = []
    return [*before, *(one for one in found if one not in before)]


def _rules() -> dict[str, Path]:
    """The file of each registered prediction's rule, by its number."""
    # scipy, which the rules need, takes a second to import
    from simvq_moe.analysis.predictions import REGISTERED

    return {one.number: one.file for one in REGISTERED}


def _stamp(file: Path) -> Stamp:
    commit, date = last_change(file) or (None, None)
    return Stamp(file=shown_name(file), commit=commit, date=date)
