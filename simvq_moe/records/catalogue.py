"""Every metric that a run can log, once: TensorBoard, reports, `watch`, the progress line and
docs/metrics.md follow from here.

A metric is one entry in described_models.py or described_slots.py, or one that a plug-in brings
(`describe`); their order is that of columns, charts and rows. A name that no entry describes is
shown as it is, with four digits.
"""

from __future__ import annotations

from functools import lru_cache

from simvq_moe.records.described_models import COSTS, ERRORS, LOSSES, TASKS
from simvq_moe.records.described_slots import BANKS, ROUTERS, USAGE
from simvq_moe.records.metric import Chart, Metric

SECTIONS = {
    "Errors": ERRORS,
    "Usage of slots": USAGE,
    "Terms of the training loss": LOSSES,
    "Routers on the probe": ROUTERS,
    "Banks and shared maps": BANKS,
    "Progress and cost": COSTS,
    "Tasks of lm-eval": TASKS,
}
METRICS: list[Metric] = [one for section in SECTIONS.values() for one in section]
ALL_BANKS = "mean"
"""It stands for all banks of a run in names of curves, such as "bank/mean/condition"."""
WHOLE = ("codes", "codes/mean", "moe/mean")
"""Where the usage of a whole model is logged: of one codebook, of several, of MoE layers."""

OF_TASKS = "eval/"
"""How names of measures of tasks begin."""
HELD_OUT = {"codes": "val/codes/", "experts": "val/moe/mean/"}
"""How the held-out usage measures of a kind of slot begin; of experts, the mean over layers."""


def describe(*metrics: Metric) -> None:
    """Add what a plug-in logs: it is printed, charted and compared as the entries say.

    Raises:
        ValueError: a metric of this name has another entry.
    """
    for one in metrics:
        known = find(one.name)
        if known not in (None, one):
            raise ValueError(f"metric {one.name!r} is {known.label!r} already: name it otherwise")
        if known is None:
            METRICS.append(one)
            find.cache_clear()


@lru_cache(100_000)
def find(name: str) -> Metric | None:
    """The entry of a metric's name; None: there is none."""
    return next((one for one in METRICS if one.pattern.fullmatch(name)), None)


def metric(name: str) -> Metric:
    """The entry of a metric's name; one that no entry describes is called by its last part."""
    leaf = name.rsplit("/", 1)[-1].replace("_", " ")
    return find(name) or Metric(name, f"training {leaf}" if name.startswith("train/") else leaf, "")


def label(name: str) -> str:
    """What a metric is called, with the step or the kind of bank that is part of its name."""
    text, leaf = metric(name).label, name.rsplit("/", 1)[-1]
    if name.startswith(OF_TASKS) and name.count("/") > 1:
        task, measure = name.removeprefix(OF_TASKS).split("/", 1)
        return f"{task} {measure.replace('_', ' ') if '{measure}' in metric(name).name else text}"
    if leaf.isdigit():
        return f"{text} at step {leaf}"
    if name.startswith("bank/") and (kind := name.split("/")[1]) != ALL_BANKS:
        return f"{text}: {kind}"
    return text


def directed(name: str) -> str:
    """`label` with an arrow to where it is better, "entropy ↑"."""
    arrow = {"higher": " ↑", "lower": " ↓", None: ""}[metric(name).better]
    return label(name) + arrow


def charted(chart: Chart) -> list[Metric]:
    """The metrics of a chart, in the order of the catalogue."""
    return [one for one in METRICS if chart in one.charts]


def names(chart: Chart) -> list[str]:
    """The metrics of a chart that have one name each."""
    return [one.name for one in charted(chart) if "{" not in one.name]


def usage_leaves(chart: Chart) -> list[str]:
    """The usage measures of a chart, each as the last part of its names."""
    return [one.leaf for one in USAGE if chart in one.charts and "{" in one.name]


def held_out_names() -> list[str]:
    """Names of held-out measures of a whole run, such as a sweep's outcomes may be."""
    found = []
    for one in METRICS:
        slots = [one.name.replace("{slots}", place) for place in WHOLE]
        named = [name.replace("[val/]", "val/") for name in dict.fromkeys(slots)]
        found += [name for name in named if name.startswith("val/") and "{" not in name]
    return found


def router_leaves(chart: Chart) -> list[str]:
    """The measures of routers of a chart, each as the last part of its names."""
    return [one.leaf for one in ROUTERS if chart in one.charts]


def compared_leaves() -> list[str]:
    """The usage measures that are compared with the baseline beside the outcomes, in order."""
    places = {one.pair: one.leaf for one in USAGE if one.pair is not None}
    return [places[place] for place in sorted(places)]


def briefly() -> list[tuple[Metric, str]]:
    """What the progress line and `watch` show: metrics, each with a name that it may be logged
    under."""
    shown = [one for one in METRICS if one.brief]
    return [
        (one, name)
        for one in shown
        for name in ([f"{w}/{one.leaf}" for w in WHOLE] if "{" in one.name else [one.name])
    ]


def results(where: tuple[str, ...] = WHOLE) -> list[str]:
    """The held-out numbers that say most about a run.

    Args:
        where: where the usage of its model is logged, some of `WHOLE`.
    """
    errors = [name for name in names("overview") if name.startswith("val/")]
    return [*errors, *(f"val/{place}/{m}" for place in where for m in usage_leaves("overview"))]
