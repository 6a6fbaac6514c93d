"""What the files of a run and of a sweep hold, and readers that let nothing else through.

The folder may be anybody's: a file is read only where it lies in the folder itself, is of its
schema and in bounds; text of it is safe to show. Whatever is not raises a `BrokenFileError`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel, model_validator

from simvq_moe.core.usage import Kind
from simvq_moe.files.arrays import Layout, read_arrays
from simvq_moe.files.regular import (
    BrokenFileError,
    MissingFileError,
    open_regular,
    printable,
    read_bytes,
    read_json,
    validate,
    validate_json,
)
from simvq_moe.files.yaml import read_yaml

SMALL = 2**24
"""Bytes of a JSON file that are read at most, and of a line of metrics.jsonl: 16 MiB."""
LONGEST_LINE = 4_000
"""Characters of a text that are shown."""
LARGEST = 1e100
"""The largest finite metric, so that squares and cubes of it are finite too."""
NOBODY = -1
"""An id of a probe that means no expert."""
MOST_SLOTS = 2**31 - 1
MOST_DRAWS = 2**62
"""Draws of all slots of a layer together, at most, so that their sum is an int64."""
PICTURE_LIMIT, SOUND_LIMIT, TEXT_LIMIT = 2**26, 200_000, 2**20
"""Bytes of a sample that are read at most."""


def shown(text: str) -> str:
    """Text of a stranger as one line that neither a terminal nor a page obeys."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= LONGEST_LINE else text[:LONGEST_LINE] + "…"


_shown_name = lru_cache(100_000)(shown)
Line = Annotated[str, AfterValidator(shown)]
Whole = Annotated[int, Field(ge=0, le=2**53)]
"""A number of steps, tokens or the like, which a float64 holds."""
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Finite = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]


class _Content(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Line(RootModel[dict[str, float]]):
    """A line of metrics.jsonl."""


class _Summary(RootModel[dict[str, float | str]]):
    """summary.json, whose status alone is text."""


class LayerMeta(_Content):
    """A counted layer in meta.json, `simvq_moe.records.usage_metrics.Layer`."""

    kind: Kind
    slots: Annotated[int, Field(ge=1, le=MOST_SLOTS)]
    top_k: Annotated[int, Field(ge=1, le=MOST_SLOTS)] = 1


class Meta(_Content):
    """meta.json, as `simvq_moe.training.meta` writes it: what a report and a watcher need of it."""

    status: Literal["running", "finished", "failed", "interrupted", "pending"] | None = None
    error: Line | None = None
    task: Line | None = None
    arm: Line | None = None
    seed: Seed | None = None
    command: Line | list[Line] | None = None
    commit: Line | None = None
    started: Line | None = None
    versions: dict[Line, Line] | None = None
    device: Line | None = None
    world_size: Whole | None = None
    layers: list[LayerMeta] | None = None
    banks: list[Line] | None = None
    parameters: dict[Line, Whole] | None = None


class SavedConfig(_Content):
    """What config.yaml says of the run itself; all other keys are only shown."""

    seed: Seed | None = None
    arm: Line | None = None
    name: Line | None = None
    task: Line | None = None
    steps: Whole | None = Field(default=None, alias="train.steps")


def _relative(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise ValueError("must be a folder below that of sweep.json")
    return path


class ListedRun(_Content):
    """A run of a sweep: where it is, if it has begun."""

    dir: Annotated[str, AfterValidator(_relative)]


class ListedArm(_Content):
    runs: list[ListedRun]


class ListedGroup(_Content):
    arms: list[ListedArm]


class ListedRuns(_Content):
    """sweep.json as far as a watcher needs it."""

    groups: list[ListedGroup]


class SavedRun(ListedRun):
    seed: Seed
    status: Line | None = None


class SavedArm(_Content):
    """An arm in sweep.json."""

    name: Line
    label: Line = ""
    control: bool = False
    lr: dict[Line, Any] | None = None
    runs: list[SavedRun]

    @model_validator(mode="after")
    def _check(self) -> SavedArm:
        _unique("seed", [run.seed for run in self.runs])
        return self


class SavedGroup(_Content):
    """A group in sweep.json."""

    name: Line
    question: Line = ""
    config: Line | None = None
    baseline: Line
    outcomes: list[Line]
    primary: dict[Line, Line] | None = None
    notes: Line | None = None
    arms: list[SavedArm]

    @model_validator(mode="after")
    def _check(self) -> SavedGroup:
        names = [arm.name for arm in self.arms]
        _unique("arm", names)
        if self.baseline not in names:
            raise ValueError(f"its baseline {self.baseline!r} is none of its arms")
        return self


class Stamp(_Content):
    """A file that says beforehand what a sweep is to show, as it was when its runs began."""

    file: Line
    """The sweep's file, or the one that has the rules of its predictions."""
    commit: Line | None = None
    """The commit of its last change; None: it is in no repository of git, or was not committed."""
    date: Line | None = None
    """When that was, in ISO 8601."""


class SavedSweep(_Content):
    """sweep.json, as `simvq_moe.sweeps.plan.write_plan` writes it."""

    name: Line = ""
    title: Line | None = None
    command: Line | None = None
    predictions: list[Line] | None = None
    registered: list[Stamp] | None = None
    groups: Annotated[list[SavedGroup], Field(min_length=1)]


def _unique(what: str, values: list[Any]) -> None:
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"{what} {twice!r} stands there twice")


def read_meta(run: Path) -> dict[str, Any]:
    """meta.json, without what it does not say; a missing file says nothing."""
    try:
        found = read_json(run / "meta.json", Meta, limit=SMALL, inside=run)
    except MissingFileError:
        return {}
    return found.model_dump(exclude_none=True)


def read_config(run: Path) -> tuple[dict[str, Any], SavedConfig]:
    """config.yaml by dotted keys, and what it says of the run; a missing file says nothing."""
    file = run / "config.yaml"
    try:
        content = read_yaml(file, inside=run)
    except MissingFileError:
        content = {}
    flat = dict(_flat(content))
    return flat, validate(flat, SavedConfig, file)


def read_summary(run: Path) -> dict[str, float]:
    """summary.json, by metric; a missing file says nothing."""
    file = run / "summary.json"
    try:
        content = read_json(file, _Summary, limit=SMALL, inside=run).root
    except MissingFileError:
        return {}
    content.pop("status", None)
    return _metrics(content, file)


def read_metrics(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl, an entry a step; a missing file has none.

    A resumed run repeats steps: its later lines hold. A torn last line is left out.
    """
    file = run / "metrics.jsonl"
    steps: dict[float, dict[str, float]] = {}
    try:
        with open_regular(file, inside=run) as stream:
            for number, line in enumerate(_lines(stream, file), start=1):
                found = metrics_of(line, f"{file}, line {number},")
                steps[found["step"]] = found
    except MissingFileError:
        return []
    return [steps[step] for step in sorted(steps)]


def _lines(stream: Any, file: Path) -> Iterator[bytes]:
    while line := stream.readline(SMALL):
        if line.endswith(b"\n"):
            yield line
        elif len(line) == SMALL:
            raise BrokenFileError(file, f"has a line of more than {SMALL:,} bytes")


def metrics_of(line: bytes, where: str) -> dict[str, float]:
    """A whole line of metrics.jsonl: numbers by name, one of them the step.

    Args:
        where: names the line in an error.
    """
    found = _metrics(validate_json(line, _Line, where).root, where)
    step = found.get("step", -1.0)
    if not (0 <= step <= 2**53 and step.is_integer()):
        raise BrokenFileError(where, "must have a step, which is a whole number")
    return found


def _metrics(content: dict[str, Any], where: Path | str) -> dict[str, float]:
    for name, value in content.items():
        if isinstance(value, str):
            raise BrokenFileError(where, f"has {shown(name)} {shown(value)[:60]!r}: not a number")
        if LARGEST < abs(value) < float("inf"):
            raise BrokenFileError(where, f"has {shown(name)} {value:g}: beyond ±{LARGEST:g}")
    return {_shown_name(name): float(value) for name, value in content.items()}


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = prefix + _shown_name(str(key))
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield name, _plain(value)


def _plain(value: Any) -> Any:
    """A value of YAML as it may be shown and written to JSON."""
    if isinstance(value, dict):
        return {_shown_name(str(key)): _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, bool | int | float) or value is None:
        return value
    return shown(str(value))


def read_plan(folder: Path) -> list[Path]:
    """Folders of the runs that a sweep.json plans."""
    plan = read_json(folder / "sweep.json", ListedRuns, limit=SMALL, inside=folder)
    return [folder / run.dir for group in plan.groups for arm in group.arms for run in arm.runs]


def read_sweep(folder: Path) -> SavedSweep:
    """sweep.json."""
    return read_json(folder / "sweep.json", SavedSweep, limit=SMALL, inside=folder)


def read_held_out_counts(run: Path, layers: list[dict[str, Any]]) -> np.ndarray | None:
    """The held-out counts of the last evaluation in usage.npz, int64 [layer, slot].

    Args:
        layers: those of meta.json, whose slots must be there; empty: not known.
    """
    file = run / "usage.npz"
    try:
        counts = read_arrays(file, {"val_counts": Layout("iu", 3, optional=True)}, inside=run)
    except MissingFileError:
        return None
    if not len(counts.get("val_counts", ())):
        return None
    last = counts["val_counts"][-1]
    _check_counts(last, file)
    _check_layers(last, layers, file)
    return last.astype(np.int64)


class Windows(NamedTuple):
    """Counts of all logged windows of a run."""

    steps: np.ndarray
    """int64, where each window ends, ascending."""
    counts: np.ndarray
    """Draws, int64 [window, layer, slot], zero behind the last slot of a layer."""


def read_windows(
    run: Path, layers: list[dict[str, Any]], *, held_out: bool, limit: int
) -> Windows | None:
    """The counts of every window in usage.npz, or of every evaluation; None: there are none.

    Args:
        layers: those of meta.json, whose slots must be there; empty: not known.
        held_out: those of evaluations.
        limit: bytes that the counts may have, unpacked.
    """
    file, prefix = run / "usage.npz", "val_" if held_out else ""
    names = f"{prefix}steps", f"{prefix}counts"
    layouts = {names[0]: Layout("iu", 1, optional=True), names[1]: Layout("iu", 3, optional=True)}
    try:
        found = read_arrays(file, layouts, limit=limit, inside=run)
    except MissingFileError:
        return None
    steps, counts = (found.get(name, np.zeros(0, np.int64)) for name in names)
    if not counts.size:
        return None
    if len(steps) != len(counts):
        raise BrokenFileError(file, f"has {len(steps)} {names[0]} for {len(counts)} {names[1]}")
    _check_range(names[0], steps, 0, 2**53, file)
    if (np.diff(steps.astype(np.int64)) <= 0).any():
        raise BrokenFileError(file, f"has {names[0]} that do not ascend")
    _check_counts(counts, file)
    _check_layers(counts[-1], layers, file)
    return Windows(steps.astype(np.int64), counts.astype(np.int64, copy=False))


def read_probe(run: Path) -> dict[str, np.ndarray] | None:
    """How the probe was routed, from probe.npz, as `simvq_moe.training.probe` keeps it: ids
    [evaluation, layer, token, choice], -1 is nobody, and tokens of each expert and domain; older
    ones lack the steps of evaluations and the tokens' ids; None: there is none."""
    file = run / "probe.npz"
    layouts = {"ids": Layout("iu", 4), "domain_counts": Layout("iu", 4)}
    layouts |= {"domain_names": Layout("U", 1), "domains": Layout("iu", 1)}
    layouts |= dict.fromkeys(("steps", "token_ids"), Layout("iu", 1, optional=True))
    try:
        found = read_arrays(file, layouts, inside=run)
    except MissingFileError:
        return None
    ids, counts = found["ids"], found["domain_counts"]
    shape = f"ids of shape {ids.shape} and domain_counts of shape {counts.shape}"
    fit = counts.shape[:2] == ids.shape[:2] and ids.shape[2] == len(found["domains"])
    if not fit or not ids.size or not counts.size:
        raise BrokenFileError(file, f"has {shape}, of {len(found['domains'])} tokens")
    _check_range("ids", ids, NOBODY, counts.shape[2], file)
    _check_range("domains", found["domains"], 0, counts.shape[3], file)
    if len(found["domain_names"]) != counts.shape[3]:
        raise BrokenFileError(file, f"has {len(found['domain_names'])} domain_names for {shape}")
    for name, of in (("steps", ids.shape[0]), ("token_ids", ids.shape[2])):
        if len(found.get(name, range(of))) != of:
            raise BrokenFileError(file, f"has {len(found[name])} {name} for {shape}")
    _check_counts(counts[-1], file)
    return found


def read_spectra(run: Path) -> dict[int, np.ndarray]:
    """spectra.npz: singular values from the largest on, by number of the bank; a missing file has
    none."""
    file = run / "spectra.npz"
    try:
        found = read_arrays(file, {}, others=Layout("f", 1), inside=run)
    except MissingFileError:
        return {}
    spectra = {}
    for name, values in found.items():
        if not re.fullmatch("[0-9]{1,9}", name):
            raise BrokenFileError(file, f"has an array {name}: arrays have numbers of banks")
        if not (np.isfinite(values).all() and (values >= 0).all() and (values <= LARGEST).all()):
            raise BrokenFileError(file, f"has in {name} values that are no singular values")
        spectra[int(name)] = values.astype(np.float64)
    return spectra


def _check_layers(counts: np.ndarray, layers: list[dict[str, Any]], file: Path) -> None:
    """Counts of one window must be of these layers, if any are known."""
    slots = max((layer["slots"] for layer in layers), default=0)
    if layers and (len(counts) != len(layers) or counts.shape[1] < slots):
        raise BrokenFileError(
            file, f"has counts of shape {counts.shape} for {len(layers)} layers of {slots} slots"
        )


def _check_counts(counts: np.ndarray, file: Path) -> None:
    if counts.size and (counts.min() < 0 or counts.sum(dtype=np.float64) > MOST_DRAWS):
        raise BrokenFileError(file, "has counts below 0, or beyond all bounds")


def _check_range(name: str, values: np.ndarray, least: int, end: int, file: Path) -> None:
    if values.size and (values.min() < least or values.max() >= end):
        raise BrokenFileError(file, f"has {name} that are not from {least} to {end - 1}")


def read_sample(run: Path, file: Path) -> bytes:
    """The bytes of a sample: a picture, a sound or a text."""
    limit = {".png": PICTURE_LIMIT, ".wav": SOUND_LIMIT}.get(file.suffix, TEXT_LIMIT)
    return read_bytes(file, limit=limit, inside=run)
