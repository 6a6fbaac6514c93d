"""Trackers: what they get, that none can stop a run, and what ours leave in their tools."""

from __future__ import annotations

import importlib
import json
import logging
import struct
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simvq_moe.cli import main
from simvq_moe.config.registry import kinds
from simvq_moe.config.schema import Config, TrainConfig
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.extras import EXTRAS
from simvq_moe.records.run_log import RunLog
from simvq_moe.records.trackers import guarded
from simvq_moe.records.trackers.base import TrackerOptions
from simvq_moe.records.trackers.guarded import check_trackers
from simvq_moe.records.trackers.ids import ids_of_run, known_ids
from simvq_moe.records.usage_metrics import Layer, usage_metrics
from tests.records.my_tracker import FAILS_AT
from tests.short_training import train_flags

LAYERS = [Layer("experts", 4, 2)]
COUNTS = [np.array([8, 0, 0, 0])]
PIXELS = np.zeros((8, 8, 3), np.uint8)


def config_of(folder: Path, *trackers: str) -> Config:
    train = TrainConfig(steps=6, trackers=trackers)
    config = Config(task="language_model", arm="mapped", seed=3, name="s/g/mapped/seed3")
    return replace(config, runs_dir=str(folder), train=train)


def write_steps(config: Config, steps: range, ids: dict[str, str], *, known: bool = False) -> None:
    """Log steps as a run does, or, of known ids, as one that goes on does."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    log = RunLog(
        config.run_dir,
        LAYERS,
        steps[0] - 1,
        steps=config.train.steps,
        config=config,
        tracker_ids=ids,
        known=ids if known else {},
    )
    for step in steps:
        log.write(step, {"train/loss": 1 / step, **usage_metrics(LAYERS, COUNTS)}, COUNTS, None)
    log.write_samples(steps[-1], PIXELS)
    log.write_text(steps[-1], "to be *or* not")
    log.close()


def logged(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_tracker_gets_lines_pictures_parameters_and_tags(tmp_path: Path) -> None:
    config = config_of(tmp_path, "lines")
    write_steps(config, range(1, 7), {"lines": "0" * 16})
    first, *rest = map(json.loads, (config.run_dir / "lines.jsonl").read_text().splitlines())
    assert (first["id"], first["name"], first["project"]) == ("0" * 16, config.name, "simvq_moe")
    assert first["tags"] == {"task": "language_model", "arm": "mapped", "seed": "3"}
    assert first["parameters"]["train.trackers"] == ["lines"]
    assert first["parameters"]["moe.router.kind"] == "topk"
    assert not any(key.startswith("quantizer") for key in first["parameters"])
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    assert rest[:6] == [json.loads(line) for line in lines]
    assert rest[6] == {"image": "samples", "at": 6, "shape": [8, 8, 3]}
    assert rest[-1] == {"finished": True}
    assert not (config.run_dir / "tensorboard").exists()


def test_steps_that_a_resume_repeats_are_logged_once(tmp_path: Path) -> None:
    config, ids = config_of(tmp_path, "lines"), {"lines": "0" * 16}
    write_steps(config, range(1, 5), ids)
    write_steps(config, range(3, 7), ids, known=True)
    assert logged(config.run_dir) == [1, 2, 3, 4, 5, 6]
    lines = map(json.loads, (config.run_dir / "lines.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("call", ["open", "write", "image", "close"])
def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(FAILS_AT, call)
    config = config_of(tmp_path, "failing", "lines")
    write_steps(config, range(1, 7), {})
    (warning,) = (one for one in caplog.records if one.levelno >= logging.WARNING)
    assert warning.getMessage() == (
        "train.trackers: failing gets no more of this run, whose metrics.jsonl has all: "
        f"ConnectionError: nobody answers {call}"
    )
    assert logged(config.run_dir) == [1, 2, 3, 4, 5, 6]
    assert '"finished": true' in (config.run_dir / "lines.jsonl").read_text()


@pytest.mark.parametrize("call", ["open", "write", "close"])
def test_a_tracker_that_hangs_holds_a_run_up_for_seconds_at_most(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(FAILS_AT, f"{call} hangs")
    monkeypatch.setattr(guarded, "SECONDS_TO_BEGIN", 0.2)
    monkeypatch.setattr(guarded, "SECONDS_TO_END", 0.2)
    config = config_of(tmp_path, "failing")
    begun = time.monotonic()
    write_steps(config, range(1, 7), {})
    assert time.monotonic() - begun < 30  # it sleeps for 60
    assert "it has not ended within 0.2 s" in caplog.text
    assert logged(config.run_dir) == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_falls_behind_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(FAILS_AT, "write hangs")
    monkeypatch.setattr(guarded, "WAITING", 3)
    write_steps(config_of(tmp_path, "failing"), range(1, 7), {})
    assert caplog.text.count("failing") == 1
    assert "it is 3 calls behind" in caplog.text


def test_a_resumed_run_keeps_its_ids_and_gets_new_ones_for_new_trackers() -> None:
    known = known_ids({"trackers": {"lines": "0123456789abcdef", "failing": "../x", "wandb": 3}})
    assert known == {"lines": "0123456789abcdef"}
    ids = ids_of_run(("tensorboard", "lines", "failing"), known)
    assert ids.keys() == {"lines", "failing"}
    assert ids["lines"] == "0123456789abcdef"
    assert known_ids({"trackers": [1]}) == known_ids({}) == {}


def test_training_logs_to_a_tracker_and_a_longer_run_goes_on_there(
    world: World, tmp_path: Path
) -> None:
    small = (
        *("--train.batch_size", "4", "--data.crops", "16", "--data.held_out_crops", "18"),
        *("--data.image_size", "8", "--image_tokenizer.hidden", "4", "--quantizer.codes", "8"),
        *("--quantizer.width", "4", "--train.trackers", "lines", "--train.log_every", "1"),
    )
    run = train_flags(world, tmp_path, *small, "--train.steps", "2")
    lines = [json.loads(line) for line in (run / "lines.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [1, 2]
    assert any(line.get("image") == "samples" for line in lines)
    assert len(lines[0]["id"]) == 16


@pytest.mark.parametrize(
    ("trackers", "words"),
    [
        (("mine",), "train.trackers 'mine': use one of"),
        (("tensorboard", "tensorboard"), "train.trackers 'tensorboard' stands there twice"),
        (
            ("wandb",),
            "train.trackers 'wandb': wandb is not installed: pip install 'simvq-moe[wandb]', "
            "or leave it out",
        ),
    ],
)
def test_trackers_that_can_not_be_are_refused_in_a_line_before_anything_is_written(
    trackers: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(guarded, "is_installed", lambda name: name != "wandb")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--train.trackers", *trackers]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_has_a_package_s_name_is_not_that_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "simvq_moe_no_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not guarded.is_installed("simvq_moe_no_package")
    assert guarded.is_installed("numpy")


def test_every_tracker_of_ours_has_an_extra() -> None:
    ours = {kind: one for kind, one in kinds(TrackerOptions).items() if "simvq" in one.__module__}
    assert ours.keys() == {"tensorboard", "wandb", "mlflow", "trackio"}
    assert all(one.package in EXTRAS for one in ours.values())


# the tools themselves: these tests run where they are installed


@pytest.fixture
def patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Busy machines are slow, and what is tested here is not how fast they are."""
    monkeypatch.setattr(guarded, "SECONDS_TO_BEGIN", 300)
    monkeypatch.setattr(guarded, "SECONDS_TO_END", 300)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)


def resumed(tmp_path: Path, tracker: str, caplog: pytest.LogCaptureFixture) -> Config:
    """Steps 1 to 4, and 3 to 6 after a resume, in the tracker."""
    try:
        check_trackers([tracker])
    except ConfigError as error:
        pytest.skip(str(error))
    config, ids = config_of(tmp_path, tracker), {tracker: "0123456789abcdef"}
    with warnings.catch_warnings():  # of the tools' own
        warnings.simplefilter("ignore")
        write_steps(config, range(1, 5), ids)
        write_steps(config, range(3, 7), ids, known=True)
    assert "gets no more" not in caplog.text
    return config


@pytest.mark.usefixtures("patient")
def test_mlflow_has_one_run_with_every_step_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = resumed(tmp_path, "mlflow", caplog)
    client: Any = pytest.importorskip("mlflow").MlflowClient()
    experiment = client.get_experiment_by_name("simvq_moe")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (config.name, "FINISHED")
    assert {"arm": "mapped", "seed": "3"}.items() <= run.data.tags.items()
    assert run.data.params["optimizer.lr"] == "0.001"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((one.step, one.value) for one in history) == [(s, 1 / s) for s in range(1, 7)]
    assert "moe/00/used" in run.data.metrics
    found = {one.path for one in client.list_artifacts(run.info.run_id, "samples")}
    assert {"samples/000004.png", "samples/000006.png", "samples/000006.md"} <= found


@pytest.mark.usefixtures("patient")
def test_trackio_has_one_run_with_every_step_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumed(tmp_path, "trackio", caplog)
    trackio: Any = pytest.importorskip("trackio")
    (run,) = trackio.Api().runs("simvq_moe")
    assert run.name == "s.g.mapped.seed3-012345"
    assert run.config["arm"] == "mapped"
    assert run.config["optimizer.lr"] == 1e-3
    storage: Any = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    lines = storage.get_logs("simvq_moe", run.name)
    values = [(one["step"], one["train/loss"]) for one in lines if "train/loss" in one]
    assert values == [(s, 1 / s) for s in range(1, 7)]


@pytest.mark.usefixtures("patient")
def test_wandb_has_the_steps_of_one_run_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = resumed(tmp_path, "wandb", caplog)
    files = sorted((config.run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == ["run-0123456789abcdef.wandb"] * 2
    records = [record for file in files for record in records_of(file)]
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.display_name, run.run_group, run.project) == (
        *(config.name, "s/g/mapped"),
        "simvq_moe",
    )
    assert {"arm:mapped", "seed:3"} <= set(run.tags)
    history = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in h.item}
        for h in (r.history for r in records if r.WhichOneof("record_type") == "history")
    ]
    values = [(line["_step"], line["train/loss"]) for line in history if "train/loss" in line]
    assert values == [(s, pytest.approx(1 / s)) for s in range(1, 7)]


def records_of(file: Path) -> list[Any]:
    """What a file that wandb writes offline holds: 7 bytes, then blocks of 32 KiB like LevelDB's,
    of pieces of records with their lengths and kinds (1: whole, 2: first, 3: more, 4: last)."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    content, at, found, whole = file.read_bytes(), 7, [], b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(messages.Record.FromString(whole))
            whole = b""
    return found
