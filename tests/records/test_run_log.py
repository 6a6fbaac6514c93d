"""Records: what is written, what a resumed run drops, what TensorBoard shows."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

from simvq_moe.config.schema import Config, MoEConfig, TrainConfig
from simvq_moe.core.usage import usage
from simvq_moe.moe.maps import LinearMap
from simvq_moe.moe.routers.topk import TopKOptions
from simvq_moe.records import run_log
from simvq_moe.records.dead_slots import DeadSlots, ranges
from simvq_moe.records.run_log import RunLog
from simvq_moe.records.tensorboard import TOP_LOAD, closed_details, heat_map, loads, row_of_table
from simvq_moe.records.tensorboard_layout import AT_A_GLANCE, layout
from simvq_moe.records.usage_metrics import Layer, layer_names, usage_metrics
from simvq_moe.records.viridis import viridis
from tests.launching import start

EXPERTS = [Layer("experts", 4, 2), Layer("experts", 4, 2)]
COUNTS = [np.array([8, 0, 0, 0]), np.array([2, 2, 2, 2])]


def write_steps(run_dir: Path, steps: range, start: int = 0, arm: str = "base") -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "meta.json").write_text('{"command": "simvq-moe train --name here"}')
    train = TrainConfig(steps=steps[-1])
    name, folder = run_dir.name, str(run_dir.parent)
    config = Config(task="language_model", arm=arm, name=name, runs_dir=folder, train=train)
    log = RunLog(run_dir, EXPERTS, start, steps=steps[-1], config=config)
    for step in steps:
        metrics = {"train/loss": float(step), **usage_metrics(EXPERTS, COUNTS)}
        evaluated = step % 2 == 0
        metrics |= usage_metrics(EXPERTS, COUNTS, prefix="val/") if evaluated else {}
        log.write(step, metrics, COUNTS, COUNTS if evaluated else None)
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


def test_counts_are_written_while_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "SECONDS_BETWEEN_COUNTS", -1.0)
    monkeypatch.setattr(run_log, "SHARE_OF_COUNTS", 1e9)
    log = RunLog(tmp_path, EXPERTS, 0, steps=2)
    log.write(1, usage_metrics(EXPERTS, COUNTS), COUNTS, None)
    with np.load(tmp_path / "usage.npz") as saved:
        np.testing.assert_array_equal(saved["counts"], np.stack([COUNTS]))
    # no more often than for a share of the time
    monkeypatch.setattr(run_log, "SHARE_OF_COUNTS", 1e-9)
    log.write_usage()
    log.write(2, usage_metrics(EXPERTS, COUNTS), COUNTS, None)
    with np.load(tmp_path / "usage.npz") as saved:
        assert saved["steps"].tolist() == [1]
    log.close()
    with np.load(tmp_path / "usage.npz") as saved:
        assert saved["steps"].tolist() == [1, 2]


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


def test_dead_slots_are_named_with_the_steps_since_their_last_draw_also_after_a_resume(
    tmp_path: Path,
) -> None:
    dead = DeadSlots(2)
    dead.add(10, [np.array([1, 1, 0, 0, 0, 5]), np.array([1, 1])])
    dead.add(20, [np.array([3, 0, 0, 0, 0, 1]), np.array([1, 2])])
    dead.add(30, [np.array([0, 0, 0, 0, 0, 9]), np.array([2, 1])])
    assert dead.table(["moe/00", "moe/01"], 30).splitlines()[2:] == [
        "| moe/00 | 5 of 6 | always | 2-4 |",
        "| moe/00 | 5 of 6 | 20 | 1 |",
        "| moe/00 | 5 of 6 | 10 | 0 |",
        "| moe/01 | 0 of 2 | | |",
    ]
    many = DeadSlots(1)
    many.add(1, [np.arange(400) % 2])
    assert many.table(["codes"], 1).endswith("116, 118 and 140 more |")
    assert ranges(np.array([0, 1, 2, 7])) == ["0-2", "7"]
    write_steps(tmp_path, range(1, 7))
    write_steps(tmp_path, range(5, 7), start=4)
    log = RunLog(tmp_path, EXPERTS, 6, steps=800, config=Config(name=tmp_path.name))
    log.close()
    assert "| moe/00 | 3 of 4 | always | 1-3 |" in log.dead.table(["moe/00", "moe/01"], 6)


def test_an_overview_repeats_a_few_metrics_and_the_layout_begins_with_it() -> None:
    layers = [Layer("experts", 4, 2)] * 12
    charts = layout(layers)
    assert next(iter(charts)) == "at a glance"
    assert len(charts["at a glance"]) <= 6 < len(charts["detail: load of each layer (1 is fair)"])
    names = usage_metrics(layers, [COUNTS[1]] * 12).keys() | {"train/loss", "speed/tokens_per_s"}
    shown = [f"at_a_glance/{name}" for name in sorted(names & AT_A_GLANCE)]
    assert len(shown) == 6
    patterns = [
        p for kind, tags in charts["at a glance"].values() if kind == "Multiline" for p in tags
    ]
    for name in shown:
        assert any(re.search(p, name) for p in patterns) or name.endswith("tokens_per_s")


def test_the_table_has_a_row_of_what_matters_to_the_task() -> None:
    config = Config(
        moe=MoEConfig(router=TopKOptions(map=LinearMap(base_width=8))), task="language_model"
    )
    row, _ = row_of_table(config)
    values = parse_session_start_info_plugin_data(row.value[0].metadata.plugin_data.content).hparams
    assert values["moe.router.map.base_width"].string_value == "8"
    assert values["optimizer.lr"].number_value == 1e-3
    assert not any(name.startswith(("quantizer", "audio_tokenizer")) for name in values)


def test_colours_are_those_of_matplotlib() -> None:
    shares = np.linspace(0, 1, 1_001)
    theirs = (255 * matplotlib.colormaps["viridis"](shares)[:, :3]).round()
    assert (viridis(shares) == theirs).all()


def test_a_heat_map_shows_fair_load_alike_in_every_layer_and_clips_at_the_top() -> None:
    pixels = heat_map(np.stack([loads(np.array([1, 1, 1, 1, 1, 1, 1, 1])), loads(np.eye(8)[0])]))
    assert pixels.shape == (16, 64, 3)
    brightest = heat_map(np.full((1, 1), 2 * TOP_LOAD))
    assert (pixels[8:, :8] == brightest[0, 0]).all()
    assert (pixels[:8] == pixels[0, 0]).all()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of `simvq-moe dashboard` over two runs, one of them in a sweep."""
    write_steps(tmp_path / "runs" / "a", range(1, 3))
    write_steps(tmp_path / "runs" / "sweep" / "b" / "seed0", range(1, 3), arm="mapped")
    process = start("dashboard", "--port", "0", cwd=tmp_path)
    assert process.stderr is not None
    lines = iter(process.stderr)
    address = next(line for line in lines if line.startswith("http")).strip()
    assert next(lines) == f"the tab of usage: {address}#usage\n"
    yield address
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def get(server: str, path: str, query: dict[str, Any] | None = None) -> Any:
    """JSON of one of the server's plugins; a query is sent with POST."""
    data = None if query is None else json.dumps(query).encode()
    request = urllib.request.Request(f"{server}data/plugin/{path}", data=data)
    if data is not None:
        request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def until(server: str, path: str, run: str) -> Any:
    """The JSON once it has the run."""
    end = time.monotonic() + 60
    while run not in (found := get(server, path)) and time.monotonic() < end:
        time.sleep(0.5)
    return found


def test_the_dashboard_serves_runs_by_name_on_this_machine_only(
    server: str, tmp_path: Path
) -> None:
    assert server.startswith("http://127.0.0.1:")
    tags = until(server, "scalars/tags", "a")
    assert tags.keys() == {"a", "sweep/b/seed0"}
    layout = get(server, "custom_scalars/layout")
    assert layout["category"][0]["title"] == "at a glance"
    charts = {chart["title"]: chart for c in layout["category"] for chart in c["chart"]}
    margin = charts["moe/00"]["margin"]["series"][0]
    assert margin["value"] == "moe/00/load_mean"
    assert (margin["lower"], margin["upper"]) == ("moe/00/load_min", "moe/00/load_max")
    assert set(margin.values()) <= set(tags["a"])
    assert "moe/load" in get(server, "images/tags")["a"]
    texts = get(server, "text/text?run=a&tag=at_a_glance/dead/text_summary")
    assert "<td>1-3</td>" in texts[-1]["text"]
    assert (
        "train --name here"
        in get(server, "text/text?run=a&tag=at_a_glance/command/text_summary")[0]["text"]
    )
    sort = {"startIndex": 0, "sliceSize": 10, "allowedStatuses": ["STATUS_SUCCESS"]}
    column = {"metric": {"tag": "val/moe/mean/used"}}
    query = {"experimentName": "", "colParams": [column], **sort}
    rows = get(server, "hparams/session_groups", query)["sessionGroups"]
    found = {group["name"]: group for group in rows}
    assert found.keys() == tags.keys()
    assert found["a"]["hparams"]["arm"] == "base"
    results = {m["name"]["tag"]: m["value"] for m in found["a"]["metricValues"]}
    assert results["val/moe/mean/used"] == 0.625
    # of the columns, those that differ between the runs, and final measures
    table = get(server, "hparams/experiment", {"experimentName": ""})
    assert [column["name"] for column in table["hparamInfos"]] == ["arm"]
    assert {m["name"]["tag"] for m in table["metricInfos"]} == set(results)
    assert "val/moe/mean/used" in results
    assert "moe/00/used" not in results
    assert {run["name"] for run in get(server, "usage/runs")["runs"]} == tags.keys()
    # a run that begins while it is served
    write_steps(tmp_path / "runs" / "c", range(1, 3))
    assert "c" in until(server, "scalars/tags", "c")


def test_what_custom_scalars_ask_for_at_first_is_few_charts_of_one_pattern() -> None:
    """The page asks for each chart, pattern and run of each open category, one after another."""
    layers = [*EXPERTS, Layer("codes", 4, 1)]
    summary = closed_details(layout(layers))
    kind: Any = layout_pb2  # its names are made when it is imported
    stored = kind.Layout.FromString(summary.value[0].tensor.string_val[0])
    assert [category.closed for category in stored.category] == [False, True, True, True, True]
    assert [category.title for category in stored.category] == list(layout(layers))
    charts = [chart for category in stored.category for chart in category.chart]
    assert all(len(chart.multiline.tag) <= 1 for chart in charts)


@pytest.mark.browser
def test_chromium_draws_the_overview(server: str, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    until(server, "scalars/tags", "a")
    page = subprocess.run(
        [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=30000"),
            "--window-size=1600,1400",
            f"{server}#timeseries",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    assert "sweep/b/seed0" in page
    # a few charts, and they are open at the top
    assert page.index('title="at_a_glance"') < page.index('title="layers"')
    assert "moe/mean/perplexity" in page
