"""The final numbers of a run: from its summary, its records and its counts."""

from __future__ import annotations

import math

import numpy as np

from simvq_moe.analysis.arms import RunRecord
from simvq_moe.core.usage import usage
from simvq_moe.records.catalogue import HELD_OUT, usage_leaves

MOST_TOKENS = 2**53


def value(run: RunRecord, name: str) -> float | None:
    """A final number of a finished run; a usage measure not in its summary is recounted."""
    if run.status != "finished":
        return None
    if name.startswith("parameters/"):
        found = (run.meta.get("parameters") or {}).get(name.removeprefix("parameters/"))
        return None if found is None else float(found)
    if name in run.final:
        return _finite(run.final[name])
    leaf = name.rsplit("/", 1)[-1]
    if not name.startswith(tuple(HELD_OUT.values())) or leaf not in usage_leaves("table"):
        return None
    layers = [usage(row).as_dict()[leaf] for row in run.layer_counts() if row.sum()]
    return float(np.mean(layers)) if layers else None


def early(run: RunRecord, name: str, share: float) -> float | None:
    """Mean over the logged windows in the first `share` of a finished run's steps."""
    steps, values = run.series(name)
    if run.status != "finished" or not len(steps):
        return None
    first = values[steps <= share * run.step]
    return float(first.mean()) if len(first) else None


def mean_of_banks(run: RunRecord, kind: str, leaf: str) -> float | None:
    """Mean over windows and banks of a finished run in which the measure exists.

    Args:
        run: the run.
        kind: the end of the banks' names, such as "experts.down".
        leaf: the measure.
    """
    if run.status != "finished":
        return None
    logged = [run.series(name)[1] for name in run.bank_metrics(leaf).get(kind, ())]
    values = np.concatenate([np.empty(0), *logged])
    return float(values.mean()) if len(values) else None


def held_out_tokens(run: RunRecord) -> int:
    """Tokens of the held-out set, from the summary or from the counts of the first layer."""
    if "val/tokens" in run.final:
        tokens = run.final["val/tokens"]
        return int(tokens) if 0 <= tokens <= MOST_TOKENS else 0
    counts = next(run.layer_counts(), None)
    return 0 if counts is None else int(counts.sum()) // int(run.layers[0]["top_k"])


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
