"""What the page asks, answered as plain values for JSON, each bounded in size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from simvq_moe.data.text.tokenizer import TOKENIZER_FILE, open_tokenizer
from simvq_moe.files.of_runs import USAGE
from simvq_moe.files.regular import BrokenFileError, is_inside
from simvq_moe.records.usage_metrics import Layer
from simvq_moe.runs.counts import Windows
from simvq_moe.runs.files import shown
from simvq_moe.usage_tab.folders import Folder, Run
from simvq_moe.usage_tab.measures import SHOWN, chance, over_windows, plain, spells, thinned

POINTS, POINTS_COMPARED = 240, 60
"""Windows of a chart: of one run, and of each of many."""
CURVE_POINTS = 1_000
"""Slots of a sorted curve."""
MOST_CELLS = 512
"""Slots of a layer that are cells of a heat map; more, and all codes, are a sorted curve."""
MOST_COMPARED = 40
"""Runs of one question."""
TOKENS_SHOWN, DOMAINS_SHOWN = 12, 16
LONGEST_TOKEN = 40
COUNTED = {"training": False, "held_out": True}
"""Which counts: of the windows of training, or of each evaluation on the held-out set."""


class WrongQuestionError(Exception):
    """A question that has no answer: the status of HTTP and a line that says why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


Question = Mapping[str, list[str]]
"""The arguments of a request; one may be given several times."""


def runs(folder: Folder, question: Question) -> dict[str, Any]:
    """Every run with counts, without reading these."""
    _arguments(question)
    found, left_out = folder.runs()
    return {
        "folder": shown(str(folder.path.absolute())),
        "left_out": left_out,
        "runs": [
            {
                **{key: getattr(run, key) for key in ("name", "group", "version", "arm", "seed")},
                **{key: getattr(run, key) for key in ("task", "status", "error")},
                "kinds": sorted({layer.kind for layer in run.layers}),
            }
            for run in found
        ],
    }


def run(folder: Folder, question: Question) -> dict[str, Any]:
    """A run over its steps: each layer's measures, the level of chance, all steps of windows."""
    _arguments(question, "run", "counted")
    one, counted = _run(folder, question), _counted(question)
    windows, layers = _windows(folder, one, counted)
    at = thinned(len(windows.steps), POINTS)
    described = []
    for i, (name, layer) in enumerate(layers):
        counts = windows.counts[:, i, : layer.slots]
        draws = int(np.median(counts.sum(1)))
        described.append(
            {
                "name": name,
                "kind": layer.kind,
                "slots": layer.slots,
                "top_k": layer.top_k,
                "cells": layer.kind != "codes" and layer.slots <= MOST_CELLS,
                "measures": {m: plain(v) for m, v in over_windows(counts[at]).items()},
                "chance": chance(layer.slots, draws) if draws else None,
            }
        )
    other = folder.windows(one, held_out=not counted)
    return {
        "name": one.name,
        "version": one.version,
        "status": one.status,
        "arm": one.arm,
        "counted": [name for name, held_out in COUNTED.items() if held_out == counted or other],
        "steps": windows.steps.tolist(),
        "points": windows.steps[at].tolist(),
        "layers": described,
        "has_probe": _probe_of(folder, one, layers) is not None,
    }


def window(folder: Folder, question: Question) -> dict[str, Any]:
    """Every layer at one window: counts, or the sorted curve of many; dead and starved slots."""
    _arguments(question, "run", "counted", "window")
    one, counted = _run(folder, question), _counted(question)
    windows, layers = _windows(folder, one, counted)
    at = _whole(question, "window", len(windows.steps))
    answers = []
    for i, (name, layer) in enumerate(layers):
        counts = windows.counts[: at + 1, i, : layer.slots]
        measures = over_windows(counts[-1:])
        answers.append(
            {
                "name": name,
                "draws": int(counts[-1].sum()),
                **{m: plain(v)[0] for m, v in measures.items()},
                **_slots(counts[-1], layer),
                **{f"{what}_slots": rows for what, rows in spells(windows.steps, counts).items()},
            }
        )
    return {"step": int(windows.steps[at]), "window": at, "layers": answers}


def _slots(counts: np.ndarray, layer: Layer) -> dict[str, Any]:
    if layer.kind != "codes" and layer.slots <= MOST_CELLS:
        return {"counts": counts.tolist()}
    order = np.argsort(-counts, kind="stable")
    ranks = thinned(layer.slots, CURVE_POINTS)
    curve = {"ranks": ranks, "slots": order[ranks], "counts": counts[order[ranks]]}
    return {"curve": {name: values.tolist() for name, values in curve.items()}}


def slot(folder: Folder, question: Question) -> dict[str, Any]:
    """One slot over all windows, and the tokens of the probe that it takes."""
    _arguments(question, "run", "counted", "layer", "slot", "window")
    one, counted = _run(folder, question), _counted(question)
    windows, layers = _windows(folder, one, counted)
    i = _whole(question, "layer", len(layers))
    name, layer = layers[i]
    number = _whole(question, "slot", layer.slots)
    window = _whole(question, "window", len(windows.steps))
    counts = windows.counts[:, i, : layer.slots]
    at = thinned(len(windows.steps), POINTS)
    draws = counts[at].sum(1)
    with np.errstate(invalid="ignore"):
        loads = counts[at, number] * layer.slots / draws
    drawn = np.flatnonzero(counts[: window + 1, number])
    return {
        "layer": name,
        "slot": number,
        "points": windows.steps[at].tolist(),
        "counts": counts[at, number].tolist(),
        "loads": plain(loads),
        "last_drawn": int(windows.steps[drawn[-1]]) if len(drawn) else None,
        "probe": _taken(folder, one, layers, i, number, int(windows.steps[window])),
    }


def series(folder: Folder, question: Question) -> dict[str, Any]:
    """Runs over their steps as means over the layers of a kind, to be compared."""
    _arguments(question, "run", "counted")
    names, counted = question.get("run", []), _counted(question)
    if not 1 <= len(names) <= MOST_COMPARED:
        raise WrongQuestionError(400, f"{len(names)} runs were asked for: 1 to {MOST_COMPARED} are")
    known = {run.name: run for run in folder.runs()[0]}
    answers = []
    for name in names:
        one = _known(known, name)
        try:
            answers.append({"name": name, "version": one.version, **_means(folder, one, counted)})
        except (BrokenFileError, WrongQuestionError) as error:
            answers.append({"name": name, "version": one.version, "error": shown(str(error))})
    return {"runs": answers}


def _means(folder: Folder, one: Run, counted: bool) -> dict[str, Any]:
    windows, layers = _windows(folder, one, counted)

    def measure() -> dict[str, Any]:
        at = thinned(len(windows.steps), POINTS_COMPARED)
        kinds: dict[str, list[dict[str, np.ndarray]]] = {}
        even: dict[str, list[dict[str, float]]] = {}
        for i, (_, layer) in enumerate(layers):
            counts = windows.counts[at, i, : layer.slots]
            kinds.setdefault(layer.kind, []).append(over_windows(counts))
            if draws := int(np.median(counts.sum(1))):
                even.setdefault(layer.kind, []).append(chance(layer.slots, draws))
        means = {
            kind: {m: plain(np.mean([one[m] for one in found], axis=0)) for m in SHOWN}
            for kind, found in kinds.items()
        }
        levels = {
            kind: {m: float(np.mean([one[m] for one in found])) for m in SHOWN}
            for kind, found in even.items()
        }
        return {"points": windows.steps[at].tolist(), "kinds": means, "chance": levels}

    return folder.kept(one.path / USAGE, ("means", counted), measure)


def _probe_of(
    folder: Folder, one: Run, layers: list[tuple[str, Layer]]
) -> dict[str, np.ndarray] | None:
    """The probe, where its layers are those of experts that were counted."""
    try:
        probe = folder.probe(one)
    except BrokenFileError:
        return None
    experts = [layer.slots for _, layer in layers if layer.kind == "experts"]
    if probe is None or len(experts) != probe["ids"].shape[1]:
        return None
    return probe if set(experts) == {probe["domain_counts"].shape[2]} else None


def _taken(
    folder: Folder, one: Run, layers: list[tuple[str, Layer]], i: int, slot: int, step: int
) -> dict[str, Any] | None:
    """What an expert takes of the probe at the last evaluation up to a step, or at the first."""
    probe = _probe_of(folder, one, layers)
    if probe is None or layers[i][1].kind != "experts":
        return None
    number = sum(layer.kind == "experts" for _, layer in layers[:i])
    steps = probe.get("steps")
    at = len(probe["ids"]) - 1
    if steps is not None:
        at = max(0, int(np.searchsorted(steps, step, side="right")) - 1)
    taken = (probe["ids"][at, number] == slot).any(-1)
    domains = np.bincount(probe["domains"], minlength=len(probe["domain_names"]))
    own = probe["domain_counts"][at, number, slot]
    names = [shown(str(name)) for name in probe["domain_names"]]
    order = np.argsort(-own, kind="stable")[:DOMAINS_SHOWN] if len(names) > 1 else []
    return {
        "step": None if steps is None else int(steps[at]),
        "taken": int(taken.sum()),
        "tokens": len(taken),
        "domains": [
            {"name": names[d], "taken": int(own[d]), "tokens": int(domains[d])} for d in order
        ],
        "top": _top_tokens(folder, one, probe.get("token_ids"), taken),
    }


def _top_tokens(
    folder: Folder, one: Run, ids: np.ndarray | None, taken: np.ndarray
) -> list[dict[str, Any]]:
    """The tokens of which it takes most, and how many of them the probe has."""
    if ids is None:
        return []
    values, numbers = np.unique(ids[taken], return_counts=True)
    most = np.argsort(-numbers, kind="stable")[:TOKENS_SHOWN]
    text = _texts(folder, one)
    return [
        {
            "id": int(values[j]),
            "text": text(int(values[j])),
            "taken": int(numbers[j]),
            "tokens": int((ids == values[j]).sum()),
        }
        for j in most
    ]


def _texts(folder: Folder, one: Run) -> Callable[[int], str | None]:
    """The text of a token by the run's own tokenizer; None: it has none, or no such token."""
    file = one.path / TOKENIZER_FILE

    def read() -> Any:
        try:
            return open_tokenizer(file) if is_inside(file, one.path) else None
        except BrokenFileError:
            return None

    tokenizer = folder.kept(file, ("tokenizer",), read) if file.is_file() else None

    def text(token: int) -> str | None:
        if tokenizer is None or tokenizer.id_to_token(token) is None:
            return None
        # white space is seen as such
        found = tokenizer.decode([token], skip_special_tokens=False)[:LONGEST_TOKEN]
        return shown(found.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥"))

    return text


def _windows(folder: Folder, one: Run, counted: bool) -> tuple[Windows, list[tuple[str, Layer]]]:
    """Counts of a run, and its layers by name."""
    windows = folder.windows(one, held_out=counted)
    if windows is None:
        raise WrongQuestionError(404, f"{one.name} has no such counts yet")
    if one.layers:
        return windows, list(zip(one.layer_names, one.layers, strict=True))
    # a usage.npz without meta.json: every row is taken for a layer of experts
    slots = windows.counts.shape[2]
    return windows, [
        (f"layer {i:02d}", Layer("experts", slots, 1)) for i in range(windows.counts.shape[1])
    ]


def _arguments(question: Question, *known: str) -> None:
    for name in question:
        if name not in known:
            raise WrongQuestionError(400, f"{shown(name)[:60]} is no argument of this question")


def _one(question: Question, name: str) -> str:
    given = question.get(name, [])
    if len(given) != 1:
        raise WrongQuestionError(400, f"{name} must be given once: it stands {len(given)} times")
    return given[0]


def _run(folder: Folder, question: Question) -> Run:
    return _known({run.name: run for run in folder.runs()[0]}, _one(question, "run"))


def _known(known: Mapping[str, Run], name: str) -> Run:
    if name not in known:
        raise WrongQuestionError(404, f"run {shown(name)[:200]!r} is none of this folder")
    return known[name]


def _counted(question: Question) -> bool:
    """Whether the counts of the held-out set are meant."""
    name = _one(question, "counted")
    if name not in COUNTED:
        raise WrongQuestionError(
            400, f"counted {shown(name)[:60]!r} must be one of {', '.join(COUNTED)}"
        )
    return COUNTED[name]


def _whole(question: Question, name: str, end: int) -> int:
    """A whole number from 0 to below an end."""
    text = _one(question, name)
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise WrongQuestionError(400, f"{name} {shown(text)[:60]!r} must be a whole number")
    if int(text) >= end:
        raise WrongQuestionError(404, f"{name} {int(text)} is beyond the last, {end - 1}")
    return int(text)
