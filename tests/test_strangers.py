"""Files as strangers, power cuts and typing errors leave them: whatever stands in a config, a sweep
file, a run folder or a data file, a command ends soon, with its result or one line of error; it
writes nowhere else and runs no code.

Small well-formed files are mutated at random, from seeds: values of YAML and JSON trees dropped,
doubled, renamed and replaced, bytes flipped and cut off, arrays of other types and shapes, links,
FIFOs and folders in place of files.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from simvq_moe import cli
from simvq_moe.analysis.comparison import compute
from simvq_moe.analysis.run_folders import find
from simvq_moe.config.checks import check
from simvq_moe.config.loading import merge_files
from simvq_moe.config.schema import Config
from simvq_moe.data.codes import (
    PARTS,
    Manifest,
    Shard,
    TokenizerReference,
    open_codes,
    write_manifest,
    write_shard,
)
from simvq_moe.errors import ConfigError
from simvq_moe.sweeps import plan

SECONDS = 20
"""Of a core; a command that waits has six times as long, because others may share the machine."""
IN_CI, SLOW = 50, 500
"""Inputs of each of the four kinds."""
CODE = "!!python/object/apply:os.system ['touch PWNED']"
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 10**400, 2**63, -(2**64), 1e308, float("nan"), float("inf"), -0.5),
    *("", "x", "../..", "/etc/passwd", "a/../../b", "$\\frac$", "\x1b]0;x\x07", "\u202e", "\ud800"),
    *("${oc.env:HOME}", "[bold]", "<script>", "x" * 5000, "\x00", "\n", "1e3", CODE),
    *([], {}, [[]], [1], ["x"], {"a": 1}, {"step": 1}),
)
CONFIG = {
    "task": "language_model",
    "seed": 1,
    "name": "a",
    "data": {"source": "python-stdlib", "vocabulary": 512, "context": 16},
    "language_model": {"width": 16, "layers": 2, "heads": 2},
    "moe": {"experts": 4, "top_k": 2, "hidden": 8, "expert_out_map": {"kind": "linear"}},
    "quantizer": {"kind": "fsq", "levels": [8, 5], "width": 2, "codes": 40},
    "optimizer": {"lr": 1e-3},
    "train": {"steps": 4, "batch_size": 2, "log_every": 1},
}
SWEEP = {
    "name": "s",
    "title": "T",
    "seeds": [0, 1],
    "set": {"train": {"steps": 3}},
    "lr_grid": {"seed": 9, "factors": [0.5, 1.0]},
    "groups": {
        "g": {
            "question": "Q",
            "config": "config.yaml",
            "baseline": "a",
            "outcomes": ["val/loss"],
            "arms": {"a": {"label": "A"}, "b": {"label": "B", "set": {"seed": 2}}},
        }
    },
}
LAYER = {"kind": "experts", "slots": 4, "top_k": 2}
META = {
    "status": "finished",
    "error": None,
    "command": "simvq-moe train",
    "versions": {"torch": "2"},
    "task": "language_model",
    "arm": "a",
    "seed": 0,
    "layers": [LAYER, LAYER],
    "banks": ["blocks.0.moe.experts.down"],
    "parameters": {"total": 5},
}
PLAN = {
    "name": "s",
    "title": "T",
    "command": "c",
    "groups": [
        {
            "name": "g",
            "question": "Q",
            "config": "c",
            "baseline": "a",
            "outcomes": ["val/loss"],
            "primary": {"b": "val/loss"},
            "notes": "",
            "arms": [
                {"name": n, "label": n, "runs": [{"seed": 0, "dir": n, "status": "finished"}]}
                for n in "ab"
            ],
        }
    ],
}


def line(step: int) -> dict[str, float]:
    usage = {"moe/mean/used": 0.5, "moe/00/dead": 0.5, "moe/01/dead": 0.25, "moe/mean/max_vio": 1.0}
    held_out = {"val/loss": 2.0, "val/moe/mean/used": 1.0, "val/moe/mean/saturation_at/1": 0.5}
    maps = {"bank/00/condition": 2.0, "bank/00/effective_rank": 3.0}
    return {"step": step, "time": 1.0 * step, "train/loss": 3.0, **usage, **held_out, **maps}


def write_run(run: Path) -> None:
    (run / "samples/val_000001").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"name": run.name}))
    (run / "meta.json").write_text(json.dumps(META | {"arm": run.name}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line(i)) + "\n" for i in (1, 2, 3)))
    (run / "summary.json").write_text(
        json.dumps({"status": "finished", "val/tokens": 8, **line(3)})
    )
    counts = np.array([[[1, 2, 3, 10], [4, 4, 4, 4]]])
    np.savez(run / "usage.npz", val_steps=np.array([3]), val_counts=counts)
    ids = np.tile(np.array([[0, 1], [2, 3]], dtype=np.int8), (1, 2, 4, 1))
    each = np.full((1, 2, 4, 2), 2)
    of = {"domains": np.arange(8) % 2, "domain_names": np.array(["x", "y"])}
    np.savez(run / "probe.npz", steps=np.array([3]), ids=ids, domain_counts=each, **of)
    np.savez(run / "spectra.npz", **{"00": np.array([2.0, 1.0])})  # pyright: ignore[reportArgumentType]
    Image.new("RGB", (8, 8)).save(run / "samples/val_000001.png")
    (run / "samples/val_000001.txt").write_text("text")
    (run / "samples/val_000001/0_x.wav").write_bytes(b"RIFF\x24\0\0\0WAVEfmt ")


def tree(content: Any, r: random.Random) -> Any:
    """A copy with one change, somewhere."""
    if isinstance(content, dict) and content and r.random() < 0.85:
        key = r.choice(list(content))
        kind = r.randrange(6)
        if kind == 0:
            return {k: v for k, v in content.items() if k != key}
        if kind == 1:
            other = r.choice(["x", "step", "seed", "bank/x/condition", "val/moe/\x1b", key * 2])
            return {**content, other: content[key]}
        return {**content, key: tree(content[key], r)}
    if isinstance(content, list) and content and r.random() < 0.7:
        i = r.randrange(len(content))
        return [*content[:i], *[tree(content[i], r)] * r.choice([0, 1, 1, 2]), *content[i + 1 :]]
    if r.random() < 0.1:
        for _ in range(r.choice([60, 300])):
            content = [content]
        return content
    return r.choice(VALUES)


def as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


def as_yaml(content: Any) -> bytes:
    return yaml.safe_dump(content).encode(errors="replace")


def raw(content: bytes, r: random.Random) -> bytes:
    """Bytes flipped, cut off, in place of others, or very deep."""
    kind, at = r.randrange(6), r.randrange(len(content) + 1)
    changed = bytearray(content)
    if kind == 0:
        for _ in range(r.randrange(1, 9)):
            changed[r.randrange(len(changed))] ^= 1 << r.randrange(8)
    elif kind == 1:
        changed = changed[:at]
    elif kind == 2:
        changed[at:at] = r.choice([b"\xff\xfe", b"\0" * 9, b"\x1b[2J", b"\n", CODE.encode()])
    elif kind == 3:
        changed = bytearray(r.choice([b"[", b"{a: ", b'{"a":', b"- "]) * 100_000)
    elif kind == 4:
        changed[at:at] = changed
    return bytes(changed)


def other_array(array: np.ndarray, r: random.Random) -> np.ndarray:
    makers: list[Callable[[], np.ndarray]] = [
        lambda: np.ones(array.shape, r.choice(["f8", "i1", "u8", "U3", "?", "c8"])),
        lambda: array.reshape(-1)[: r.randrange(array.size + 1)],
        lambda: array[None],
        lambda: np.full(array.shape, r.choice([-1, -2, 127, 2**62, 0])),
        lambda: np.full(array.shape, r.choice([np.nan, np.inf, -1.0, 1e308, 5e-324])),
        lambda: np.empty((0, *array.shape[1:]), array.dtype),
        lambda: np.array([Evil()], dtype=object),
    ]
    return r.choice(makers)()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch PWNED",)


def change(file: Path, r: random.Random) -> None:
    """One file, by what is in it."""
    content = file.read_bytes()
    if r.random() < 0.15:
        stand_in(file, r)
    elif r.random() < 0.3:
        file.write_bytes(raw(content, r))
    elif file.suffix == ".npz":
        with np.load(file) as arrays:
            found = dict(arrays)
        name = r.choice(list(found))
        found[name] = other_array(found[name], r)
        if r.random() < 0.2:
            found[r.choice(["x", "7", "9" * 30])] = found.pop(name)
        np.savez(file, **found)  # pyright: ignore[reportArgumentType]
    elif file.suffix == ".json":
        file.write_bytes(as_json(tree(json.loads(content), r)))
    elif file.suffix == ".yaml":
        file.write_bytes(as_yaml(tree(yaml.safe_load(content), r)))
    elif file.suffix == ".jsonl":
        lines = [json.loads(text) for text in content.splitlines()]
        i = r.randrange(len(lines))
        lines[i] = tree(lines[i], r)
        file.write_bytes(b"".join(as_json(one) + b"\n" for one in lines))
    elif file.suffix == ".npy":
        np.save(file, other_array(np.load(file), r))
    else:
        file.write_bytes(raw(content, r))


def stand_in(file: Path, r: random.Random) -> None:
    file.unlink()
    kind = r.randrange(5)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to(file.name)
    elif kind == 3:
        file.symlink_to(r.choice(["/dev/zero", "/etc/passwd", ".."]))


@contextmanager
def in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"it took more than {SECONDS} s")

    numbers = (signal.SIGALRM, signal.SIGPROF)
    before = [signal.signal(number, late) for number in numbers]
    timers = (signal.ITIMER_REAL, signal.ITIMER_PROF)
    for timer, seconds in zip(timers, (6 * SECONDS, SECONDS), strict=True):
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, number, handler in zip(timers, numbers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def holds(folder: Path, act: Callable[[], object]) -> None:
    """It ends in time, by itself or with one line, and leaves nothing behind but in `out`."""

    def entries() -> set[str]:
        own = (str(path.relative_to(folder)) for path in folder.rglob("*"))
        return {name for name in own if not name.startswith("out")}

    before, here, said = entries(), Path.cwd(), ""
    os.chdir(folder)
    try:
        with in_time(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            act()
    except ConfigError as error:
        said = str(error)
    finally:
        os.chdir(here)
    assert "\n" not in said
    assert entries() == before


def number_of_inputs(number: int) -> Callable[[Any], Any]:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    of = settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=quiet,
    )
    return lambda test: of(given(st.integers(0, 2**32))(test))


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def a_config(folder: Path, r: random.Random) -> None:
    file = fresh(folder) / "config.yaml"
    file.write_bytes(as_yaml(CONFIG))
    change(file, r)
    holds(folder, lambda: check(merge_files(Config, [file])))


def a_sweep_file(folder: Path, r: random.Random) -> None:
    file = fresh(folder) / "sweep.yaml"
    file.write_bytes(as_yaml(SWEEP))
    (folder / "config.yaml").write_bytes(as_yaml(CONFIG))
    change(file, r)
    holds(folder, lambda: plan.plan([file]))


def run_folders(folder: Path, r: random.Random) -> None:
    for name in "ab":
        write_run(fresh(folder) / "runs" / name if name == "a" else folder / "runs" / name)
    if r.random() < 0.5:
        (folder / "runs/sweep.json").write_text(json.dumps(PLAN))
    files = sorted(path for path in (folder / "runs").rglob("*") if path.is_file())
    for file in r.sample(files, r.choice([1, 1, 2])):
        change(file, r)


def a_run_folder(folder: Path, r: random.Random) -> None:
    run_folders(folder, r)

    def act() -> None:
        assert cli.main(["watch", str(folder / "runs"), "--once"]) == 0
        found = find([folder / "runs"])
        json.dumps(compute(found.groups, folder, found.broken).as_json(), allow_nan=False)

    holds(folder, act)


def a_report(folder: Path, r: random.Random) -> None:
    run_folders(folder, r)
    to = ["--out", str(folder / "out")]
    holds(folder, lambda: cli.main(["report", str(folder / "runs"), *to]))


def a_data_folder(folder: Path, r: random.Random) -> None:
    shards, rows = {}, np.zeros((3, 4), dtype=np.uint16)
    for part in PARTS:
        path = (folder if shards else fresh(folder)) / f"{part}_000000.npy"
        write_shard(path, rows)
        shards[part] = (Shard(path.name, len(rows), "0" * 64),)
    reference = TokenizerReference("../a", "0" * 64, CONFIG)
    of = {"grid": (2, 2), "levels": 1, "sample_shape": (3, 8, 8), "sample_rate": 0}
    samples = {str(part): 3 for part in PARTS}
    manifest = Manifest(reference, "x", "0", 8, **of, samples=samples, shard_samples=8)
    write_manifest(folder, replace(manifest, shards=shards))
    change(r.choice(sorted(folder.iterdir())), r)

    def act() -> None:
        for part in open_codes(folder).values():
            part.batch(np.arange(len(part)))

    holds(folder, act)


KINDS = (a_config, a_sweep_file, a_run_folder, a_data_folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_ends_with_its_result_or_one_line(
    kind: Callable[[Path, random.Random], None], tmp_path: Path
):
    number_of_inputs(IN_CI)(lambda seed: kind(tmp_path / "case", random.Random(seed)))()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS[:2], a_report, a_data_folder])
def test_a_command_ends_with_its_result_or_one_line_at_length(
    kind: Callable[[Path, random.Random], None], tmp_path: Path
):
    number_of_inputs(SLOW)(lambda seed: kind(tmp_path / "case", random.Random(seed)))()


@pytest.mark.parametrize("number", [10**400, -(10**400)], ids=["above", "below"])
def test_an_integer_of_hundreds_of_digits_is_refused_in_one_line(number: int, tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text(f"seed: {number}\n")
    with pytest.raises(ConfigError, match="seed"):
        check(merge_files(Config, [file]))
