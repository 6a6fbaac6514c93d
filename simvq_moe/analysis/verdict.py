"""The answer to a group's question in plain sentences, from its numbers alone.

The tests named primary answer first, in the same words whichever way they fall; all other
differences follow with their intervals as secondary, and none of them is called established. Where
no test was named, every outcome of every arm is one, and all are adjusted together (Holm). Below
six pairs nothing can reach p < 0.05, so what is printed is a description.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from simvq_moe.analysis import stats
from simvq_moe.analysis.results import ArmResult, Paired
from simvq_moe.analysis.stats import LEVEL
from simvq_moe.records.catalogue import label, metric
from simvq_moe.records.printing import difference, percent, probability, unit

NOTHING = "No pair of finished runs yet: there is nothing to compare."


def verdict(
    arms: Sequence[ArmResult],
    outcomes: Sequence[str],
    primary: Mapping[str, str],
    paired: Sequence[Paired],
) -> list[str]:
    """The answer: of the primary tests, or of every outcome where none is named."""
    labels = _labels(arms)
    baseline = next((arm.label for arm in arms if arm.baseline), "")
    if not any(pair.n for pair in paired):
        return [NOTHING]
    if not primary:
        return _every_outcome(outcomes, [p for p in paired if p.primary and p.n], labels, baseline)
    tests = [pair for pair in paired if pair.primary]
    sentences = [_answer(pair, labels, baseline) for pair in tests if pair.n]
    sentences += [
        f"The primary test of {labels.get(arm, arm)} on {label(name)} has no pair of finished runs."
        for arm, name in primary.items()
        if not any(p.arm == arm and p.metric == name and p.n for p in tests)
    ]
    sentences += _warning([pair for pair in tests if pair.n])
    for name in dict.fromkeys(pair.metric for pair in tests if pair.n):
        controls = {arm.name for arm in arms if arm.control}
        beside = [p for p in paired if p.metric == name and p.arm in controls and p.n]
        if beside:
            changes = "; ".join(f"{_by(p)} with {labels[p.arm]}" for p in beside)
            sentences.append(f"Beside it, and not tested: {label(name)} changes by {changes}.")
    return sentences


def secondary(
    arms: Sequence[ArmResult],
    outcomes: Sequence[str],
    primary: Mapping[str, str],
    paired: Sequence[Paired],
) -> list[str]:
    """A sentence an outcome on what is not primary; none where every outcome is a test. Intervals
    on both sides of 0 are for `negative` to tell."""
    labels = _labels(arms)
    baseline = next((arm.label for arm in arms if arm.baseline), "")
    sentences = []
    for name in outcomes if primary else ():
        pairs = [p for p in paired if p.metric == name and p.n and not p.primary]
        clear = [p for p in pairs if _excludes_zero(p)]
        sides = {
            "higher with": [p for p in clear if p.mean > 0],
            "lower with": [p for p in clear if p.mean < 0],
            "without an interval, by": [p for p in pairs if not p.interval],
        }
        parts = [f"{side} {_with(some, labels)}" for side, some in sides.items() if some]
        if parts:
            start = f"Secondary, {label(name)} by its 95 % interval against {baseline}"
            sentences.append(f"{start}: {'; '.join(parts)}.")
    return sentences


def _with(pairs: Sequence[Paired], labels: Mapping[str, str]) -> str:
    return ", ".join(f"{labels[pair.arm]} ({_by(pair)})" for pair in pairs)


def negative(
    arms: Sequence[ArmResult], outcomes: Sequence[str], paired: Sequence[Paired]
) -> list[str]:
    """What did not work or could not be shown; intervals are not adjusted."""
    labels = _labels(arms)
    controls = {arm.name for arm in arms if arm.control}
    tests = [pair for pair in paired if pair.primary and pair.n]
    failed = [pair for pair in tests if not (_established(pair) and _is_better(pair))]
    sentences = [
        f"{label(pair.metric)} is "
        f"{'worsened' if _established(pair) else 'not shown to be changed'} by {labels[pair.arm]}."
        for pair in failed
    ]
    for name in outcomes:
        known = [p for p in paired if p.metric == name and p.interval and p not in failed]
        worse = [p for p in known if _excludes_zero(p) and not _is_better(p)]
        unclear = [p for p in known if not _excludes_zero(p)]
        sentences += _listed(worse, f"{label(name)}, worse by the whole 95 % interval", labels)
        sentences += _listed(unclear, f"{label(name)}, 95 % interval on both sides of 0", labels)
    for pair in tests:
        beside = [p for p in paired if p.metric == pair.metric and p.arm in controls and p.n]
        as_good = [p for p in beside if _gain(p) >= _gain(pair)]
        if pair.arm not in controls:
            start = f"In {label(pair.metric)}, {labels[pair.arm]} ({_by(pair)}) does not beat"
            sentences += _listed(as_good, start, labels)
    return sentences


def _listed(pairs: Sequence[Paired], start: str, labels: Mapping[str, str]) -> list[str]:
    return [f"{start}: {_with(pairs, labels)}."] if pairs else []


def _by(pair: Paired) -> str:
    return difference(pair.metric, pair.mean) + unit(pair.metric)


def _answer(pair: Paired, labels: Mapping[str, str], baseline: str) -> str:
    """One primary test: yes, no or not shown, with effect, interval, p and n."""
    name, arm = label(pair.metric), labels[pair.arm]
    numbers = f"({_size(pair)}; p {probability(pair.p_holm)}, n = {pair.n})"
    if not _established(pair):
        return f"Not shown: against {baseline}, {arm} changes {name} by {_by(pair)} {numbers}."
    verb = "raises" if pair.mean > 0 else "lowers"
    start = "Established"
    if metric(pair.metric).better:
        start = "Yes" if _is_better(pair) else "No, on the contrary"
    size = difference(pair.metric, abs(pair.mean)).removeprefix("+")
    return (
        f"{start}: against {baseline}, {arm} {verb} {name} by {size}{unit(pair.metric)} {numbers}."
    )


def _warning(tests: Sequence[Paired]) -> list[str]:
    """Where so few pairs can't reach significance: how many would."""
    family = max((pair.tests for pair in tests), default=0)
    needed = stats.pairs_needed(family, LEVEL) if tests else 0
    few = [pair.n for pair in tests if pair.n < needed]
    if not few:
        return []
    least, several = min(few), f" and {family} primary tests of the sweep" if family > 1 else ""
    pairs = f"n = {least} pair{'s' if least > 1 else ''}"
    return [
        f"{pairs}{several} can't reach p < {LEVEL} (smallest possible p "
        f"{probability(stats.smallest_p(least))}, before adjustment): {needed} pairs would."
    ]


def _every_outcome(
    outcomes: Sequence[str], family: Sequence[Paired], labels: Mapping[str, str], baseline: str
) -> list[str]:
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
    return f"{_by(pair)} ({_size(pair)})"


def _size(pair: Paired) -> str:
    """Relative change, interval and the pairs that agree."""
    if not any(pair.differences):
        return f"equal in {pair.n} of {pair.n} pairs"
    parts = []
    if not metric(pair.metric).is_share and math.isfinite(pair.relative):
        parts.append(percent(pair.relative))
    if pair.interval:
        ends = [difference(pair.metric, end, like=pair.mean) for end in pair.interval]
        parts.append(f"95 % interval {' to '.join(ends)}{unit(pair.metric)}")
    side = "higher" if pair.mean > 0 else "lower"
    return ", ".join([*parts, f"{side} in {pair.agree} of {pair.n} pairs"])


def _claim(pairs: Sequence[Paired], tests: int, labels: Mapping[str, str]) -> str:
    """What the number of pairs allows to say about one outcome's differences."""
    least, most = min(pair.n for pair in pairs), max(pair.n for pair in pairs)
    n = f"n = {least}" if least == most else f"n = {least} to {most}"
    needed = stats.pairs_needed(tests, LEVEL)
    if most < stats.LEAST_PAIRS:
        return (
            f"This is descriptive: with {n} pairs, fewer than {stats.LEAST_PAIRS}, nothing can "
            f"reach p < {LEVEL} (smallest possible p {probability(stats.smallest_p(most))}); "
            f"{needed} pairs would do for {tests} tests"
        )
    found = [p for p in pairs if _established(p)]
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


def _established(pair: Paired) -> bool:
    return pair.p_holm is not None and pair.p_holm < LEVEL


def _is_better(pair: Paired) -> bool:
    return _gain(pair) > 0


def _gain(pair: Paired) -> float:
    """The mean difference, positive where it is for the better."""
    return -pair.mean if metric(pair.metric).better == "lower" else pair.mean


def _excludes_zero(pair: Paired) -> bool:
    return pair.interval is not None and (pair.interval[0] > 0 or pair.interval[1] < 0)


def _labels(arms: Sequence[ArmResult]) -> dict[str, str]:
    return {arm.name: f"the control {arm.label}" if arm.control else arm.label for arm in arms}


def _list(pairs: Sequence[Paired], labels: Mapping[str, str]) -> str:
    return ", ".join(f"{labels[p.arm]} (p {probability(p.p_holm)})" for p in pairs)
