"""Records: what is written, what a resumed run drops, what TensorBoard shows."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simvq_moe.core.usage import usage
from simvq_moe.training.logs import RunLog
from simvq_moe.training.measures import Layer, layer_names, usage_metrics
from simvq_moe.training.tensorboard import TOP_LOAD, heat_map, loads
from tests.launching import start

EXPERTS = [Layer("experts", 4, 2), Layer("experts", 4, 2)]
COUNTS = [np.array([8, 0, 0, 0]), np.array([2, 2, 2, 2])]


def write_steps(run_dir: Path, steps: range, start: int = 0) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    log = RunLog(run_dir, EXPERTS, start)
    for step in steps:
        metrics = {"train/loss": float(step), **usage_metrics(EXPERTS, COUNTS)}
        log.write(step, metrics, COUNTS, COUNTS if step % 2 == 0 else None)
    log.close()


def test_usage_metrics_are_the_measures_of_each_layer_and_their_mean() -> None:
    metrics = usage_metrics(EXPERTS, COUNTS, prefix="val/")
    for name, counts in zip(("val/moe/00", "val/moe/01"), COUNTS, strict=True):
        for measure, value in usage(counts).as_dict().items():
            assert metrics[f"{name}/{measure}"] == value
    assert metrics["val/moe/mean/used"] == (0.25 + 1) / 2
    assert metrics["val/moe/window_tokens"] == 4
    assert "codes/used" in usage_metrics([Layer("codes", 4, 1)], COUNTS[:1])


def test_layers_are_numbered_within_their_kind_and_a_single_codebook_is_not() -> None:
    codes, experts = Layer("codes", 4, 1), Layer("experts", 4, 2)
    assert layer_names([codes, experts, experts]) == ["codes", "moe/00", "moe/01"]
    assert layer_names([codes, codes]) == ["codes/00", "codes/01"]


def test_a_resumed_log_drops_what_came_after_the_checkpoint_and_torn_lines(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 7))
    whole = (tmp_path / "metrics.jsonl").read_text()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')
    write_steps(tmp_path, range(5, 7), start=4)
    assert (tmp_path / "metrics.jsonl").read_text() == whole
    with np.load(tmp_path / "usage.npz") as saved:
        assert saved["steps"].tolist() == [1, 2, 3, 4, 5, 6]
        assert saved["val_steps"].tolist() == [2, 4, 6]
        assert saved["counts"].dtype == np.int64
        np.testing.assert_array_equal(saved["counts"], np.stack([COUNTS] * 6))


def test_events_hold_scalars_margins_heat_maps_and_histograms(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3))
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    loss = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert loss == [(1, 1.0), (2, 2.0)]
    assert [e.value for e in events.Scalars("moe/00/load_max")] == [4.0, 4.0]
    assert [e.value for e in events.Scalars("layers/used_min")] == [0.25, 0.25]
    assert {"moe/load", "val/moe/load"} <= set(events.Tags()["images"])
    histogram = events.Histograms("moe/01/load")[0].histogram_value
    assert (list(histogram.bucket), list(histogram.bucket_limit)) == ([2.0] * 4, [1, 2, 3, 4])


def test_a_heat_map_shows_fair_load_alike_in_every_layer_and_clips_at_the_top() -> None:
    pixels = heat_map(np.stack([loads(np.array([1, 1, 1, 1, 1, 1, 1, 1])), loads(np.eye(8)[0])]))
    assert pixels.shape == (16, 64, 3)
    brightest = heat_map(np.full((1, 1), 2 * TOP_LOAD))
    assert (pixels[8:, :8] == brightest[0, 0]).all()
    assert (pixels[:8] == pixels[0, 0]).all()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of `simvq-moe dashboard` over one run."""
    write_steps(tmp_path / "runs" / "a", range(1, 3))
    process = start("dashboard", "runs", "--port", "0", cwd=tmp_path)
    assert process.stderr is not None
    lines = iter(process.stderr)
    yield next(line for line in lines if line.startswith("http")).strip()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_the_dashboard_serves_the_layout_on_this_machine_only(server: str) -> None:
    assert server.startswith("http://127.0.0.1:")

    def get(path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"{server}data/plugin/{path}", timeout=30) as answer:
            return json.load(answer)

    until = time.monotonic() + 60
    while "a/tensorboard" not in (tags := get("scalars/tags")) and time.monotonic() < until:
        time.sleep(0.5)
    layout = get("custom_scalars/layout")
    charts = {chart["title"]: chart for c in layout["category"] for chart in c["chart"]}
    margin = charts["moe/00"]["margin"]["series"][0]
    assert margin["value"] == "moe/00/load_mean"
    assert (margin["lower"], margin["upper"]) == ("moe/00/load_min", "moe/00/load_max")
    assert set(margin.values()) <= set(tags["a/tensorboard"])
    assert "moe/load" in get("images/tags")["a/tensorboard"]
