"""The answer to a group's question in plain sentences, from its numbers alone.

Direction, size and how many pairs agree, for every arm and in the same words whichever way they
fall; then what the number of pairs allows. Below six pairs nothing can reach p < 0.05, so what is
printed is a description; from six on, only what survives Holm's adjustment is called established.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from simvq_moe.analysis import stats
from simvq_moe.analysis.measures import difference, label, measure, percent, probability, unit
from simvq_moe.analysis.results import ArmResult, Paired

LEVEL = 0.05


def verdict(
    arms: Sequence[ArmResult], outcomes: Sequence[str], paired: Sequence[Paired]
) -> list[str]:
    """A sentence an outcome, and what the number of pairs allows, said once where it is equal."""
    family = [pair for pair in paired if pair.outcome and pair.n]
    if not family:
        return ["No pair of finished runs yet: there is nothing to compare."]
    labels = {arm.name: f"the control {arm.label}" if arm.control else arm.label for arm in arms}
    baseline = next(arm.label for arm in arms if arm.baseline)
    sentences = []
    for name in outcomes:
        of_outcome = [pair for pair in family if pair.metric == name]
        if of_outcome:
            start = f"Against {baseline}, {label(name)} changes by "
            clauses = [f"{_change(pair)} with {labels[pair.arm]}" for pair in of_outcome]
            claim = _claim(of_outcome, len(family), labels)
            said = any(claim in sentence for sentence in sentences)
            sentences.append(
                f"{start}{'; by '.join(clauses)}." + (f" {claim}." if not said else "")
            )
    return sentences


def _change(pair: Paired) -> str:
    """ "−0.00094 (−31.2 %, lower in 2 of 2 pairs)"."""
    signs = [math.copysign(1, d) if d else 0 for d in pair.differences if d is not None]
    if not any(signs):
        return f"nothing (equal in {pair.n} of {pair.n} pairs)"
    sign = math.copysign(1, pair.mean)
    agree = f"{'higher' if sign > 0 else 'lower'} in {signs.count(sign)} of {pair.n} pairs"
    is_share = measure(pair.metric).kind == "share"
    relative = "" if is_share or not math.isfinite(pair.relative) else f"{percent(pair.relative)}, "
    return f"{difference(pair.metric, pair.mean)}{unit(pair.metric)} ({relative}{agree})"


def _claim(pairs: Sequence[Paired], tests: int, labels: dict[str, str]) -> str:
    """What the number of pairs allows to say about one outcome's differences."""
    least, most = min(pair.n for pair in pairs), max(pair.n for pair in pairs)
    n = f"n = {least}" if least == most else f"n = {least} to {most}"
    if most < stats.LEAST_PAIRS:
        return (
            f"This is descriptive: with {n} pairs, fewer than {stats.LEAST_PAIRS}, nothing can "
            f"reach p < {LEVEL} (smallest possible p {probability(stats.smallest_p(most))})"
        )
    needed = stats.pairs_needed(tests, LEVEL)
    found = [p for p in pairs if p.p_holm is not None and p.p_holm < LEVEL]
    open_ = [p for p in pairs if p not in found]
    parts = []
    if found:
        parts.append(f"established after Holm over {tests} tests for {_list(found, labels)}")
    if open_:
        parts.append(f"not established for {_list(open_, labels)}")
    if open_ and min(pair.n for pair in open_) < needed:
        parts.append(
            f"the first of {tests} tests under Holm needs {needed} pairs to reach p < {LEVEL}, "
            f"here {n}"
        )
    else:
        parts.append(f"{n} pairs")
    text = "; ".join(parts)
    return text[0].upper() + text[1:]


def _list(pairs: Sequence[Paired], labels: dict[str, str]) -> str:
    return ", ".join(f"{labels[p.arm]} (p {probability(p.p_holm)})" for p in pairs)
