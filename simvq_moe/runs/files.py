"""What the files of a run hold, and readers that let nothing else through.

The folder may be anybody's: a file is read only where it lies in the folder itself, is of its
schema and in bounds; text of it is safe to show. Whatever is not raises a `BrokenFileError`. Counts
and choices are read in `simvq_moe.runs.counts`, a sweep's plan in `simvq_moe.runs.sweep_file`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel

from simvq_moe.core.usage import Kind
from simvq_moe.files.arrays import Layout, read_arrays
from simvq_moe.files.of_runs import CONFIG, META, METRICS, SPECTRA, SUMMARY
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
MOST_SLOTS = 2**31 - 1
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


class Content(BaseModel):
    """A part of a file, of which what it does not name is left out."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Line(RootModel[dict[str, float]]):
    """A line of metrics.jsonl."""


class _Summary(RootModel[dict[str, float | str]]):
    """summary.json, whose status alone is text."""


class LayerMeta(Content):
    """A counted layer in meta.json, `simvq_moe.records.usage_metrics.Layer`."""

    kind: Kind
    slots: Annotated[int, Field(ge=1, le=MOST_SLOTS)]
    top_k: Annotated[int, Field(ge=1, le=MOST_SLOTS)] = 1


class Meta(Content):
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


class SavedConfig(Content):
    """What config.yaml says of the run itself; all other keys are only shown."""

    seed: Seed | None = None
    arm: Line | None = None
    name: Line | None = None
    task: Line | None = None
    steps: Whole | None = Field(default=None, alias="train.steps")


def read_meta(run: Path) -> dict[str, Any]:
    """meta.json, without what it does not say; a missing file says nothing."""
    try:
        found = read_json(run / META, Meta, limit=SMALL, inside=run)
    except MissingFileError:
        return {}
    return found.model_dump(exclude_none=True)


def read_config(run: Path) -> tuple[dict[str, Any], SavedConfig]:
    """config.yaml by dotted keys, and what it says of the run; a missing file says nothing."""
    file = run / CONFIG
    try:
        content = read_yaml(file, inside=run)
    except MissingFileError:
        content = {}
    flat = dict(_flat(content))
    return flat, validate(flat, SavedConfig, file)


def read_summary(run: Path) -> dict[str, float]:
    """summary.json, by metric; a missing file says nothing."""
    file = run / SUMMARY
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
    file = run / METRICS
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


def read_spectra(run: Path) -> dict[int, np.ndarray]:
    """spectra.npz: singular values from the largest on, by number of the bank; a missing file has
    none."""
    file = run / SPECTRA
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


def read_sample(run: Path, file: Path) -> bytes:
    """The bytes of a sample: a picture, a sound or a text."""
    limit = {".png": PICTURE_LIMIT, ".wav": SOUND_LIMIT}.get(file.suffix, TEXT_LIMIT)
    return read_bytes(file, limit=limit, inside=run)
