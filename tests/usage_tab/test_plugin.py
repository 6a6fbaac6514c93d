"""The plug-in in TensorBoard's own application: what it answers, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.application import TensorBoardWSGI
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client

from simvq_moe.records.usage_metrics import Layer
from simvq_moe.usage_tab import answers, folders, plugin
from simvq_moe.usage_tab.plugin import STATIC, UsageTab, UsageTabLoader
from tests.launching import ROOT
from tests.reports.synthetic import EXPERTS_ARMS, write_run
from tests.usage_tab.counted import EVERY, drawn, write_counted

EXPERTS = [Layer("experts", 6, 2), Layer("kept", 6, 2)] * 2
NAMES = ["moe/00", "moe_kept/00", "moe/01", "moe_kept/01"]
CODES = [Layer("codes", 3_000, 1)]


def served(folder: Path) -> Client:
    """TensorBoard's application over a folder, with no other tab."""
    tab = UsageTabLoader().load(context(folder))
    assert tab is not None
    return Client(TensorBoardWSGI([tab]))


def context(folder: Path | str) -> TBContext:
    return TBContext(logdir=str(folder))


def get(client: Client, route: str, status: int = 200, **question: Any) -> Any:
    answer = client.get(f"/data/plugin/usage/{route}", query_string=question)
    assert answer.status_code == status, answer.text
    return json.loads(answer.data)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MoE of two layers with a capacity, and a codebook in a sweep of two seeds."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("written")
    write_counted(folder / "a", EXPERTS, drawn(rng, EXPERTS, 9), arm="base", seed=3, task="t")
    for seed in range(2):
        path = folder / "sweep/codes/vq" / f"seed{seed}"
        write_counted(path, CODES, drawn(rng, CODES, 6), arm="vq", seed=seed)
    return folder


@pytest.fixture
def runs(written: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may change."""
    return Path(shutil.copytree(written, tmp_path / "runs"))


def test_pyproject_declares_the_plugin() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (named,) = project["entry-points"]["tensorboard_plugins"].values()
    assert named == f"{UsageTabLoader.__module__}:{UsageTabLoader.__name__}"


def test_tensorboard_lists_the_tab_where_a_run_has_counts_and_serves_its_page(runs: Path) -> None:
    client = served(runs)
    tab = json.loads(client.get("/data/plugins_listing").data)["usage"]
    assert tab["enabled"]
    assert tab["loading_mechanism"]["module_path"] == "/data/plugin/usage/index.js"
    page = client.get("/data/plugin_entry.html?name=usage").text
    assert 'import("./index.js")' in page
    assert 'href="plugin/usage/"' in page
    empty = runs.parent / "empty"
    empty.mkdir()
    assert not json.loads(served(empty).get("/data/plugins_listing").data)["usage"]["enabled"]


def test_what_the_page_imports_is_served_and_nothing_of_it_is_from_elsewhere(runs: Path) -> None:
    client = served(runs)
    for file in STATIC.iterdir():
        answer = client.get(f"/data/plugin/usage/{file.name}")
        assert answer.data == file.read_bytes()
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        text = file.read_text()
        for name in re.findall(r"from '\./([^']+)'|href: '\./([^']+)'", text):
            assert (STATIC / "".join(name)).is_file()
        addresses = set(re.findall(r"https?://[^'\"\s]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not addresses
        assert not re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text
        )
    assert client.get("/data/plugin/usage/../plugin.py").status_code == 404
    assert client.get("/data/plugin/usage/static/index.js").status_code == 404


def test_runs_are_listed_with_arm_seed_and_the_folder_that_they_are_compared_in(runs: Path) -> None:
    found = get(served(runs), "runs")
    assert found["left_out"] == 0
    listed = {run["name"]: run for run in found["runs"]}
    assert listed.keys() == {"a", "sweep/codes/vq/seed0", "sweep/codes/vq/seed1"}
    assert (listed["a"]["arm"], listed["a"]["seed"], listed["a"]["task"]) == ("base", 3, "t")
    assert listed["a"]["kinds"] == ["experts", "kept"]
    assert listed["sweep/codes/vq/seed1"]["group"] == "sweep/codes"


def test_a_window_has_the_counts_of_usage_npz_and_its_measures(runs: Path) -> None:
    client = served(runs)
    saved = np.load(runs / "a/usage.npz")
    for counted, prefix in (("training", ""), ("held_out", "val_")):
        steps, counts = saved[f"{prefix}steps"], saved[f"{prefix}counts"]
        run = get(client, "run", run="a", counted=counted)
        assert run["steps"] == run["points"] == steps.tolist()
        assert run["counted"] == ["training", "held_out"]
        assert [layer["name"] for layer in run["layers"]] == NAMES
        for i in range(len(steps)):
            window = get(client, "window", run="a", counted=counted, window=i)
            assert window["step"] == steps[i]
            rows = [layer["counts"] for layer in window["layers"]]
            assert rows == counts[i].tolist()
            for layer, row in zip(window["layers"], run["layers"], strict=True):
                assert layer["draws"] == sum(layer["counts"])
                for name in ("used", "entropy", "max_vio"):
                    assert layer[name] == row["measures"][name][i]


def test_codes_are_a_sorted_curve_whose_ends_are_the_most_and_the_least_used(runs: Path) -> None:
    saved = np.load(runs / "sweep/codes/vq/seed0/usage.npz")["counts"][-1, 0]
    (layer,) = get(
        served(runs), "window", run="sweep/codes/vq/seed0", counted="training", window=5
    )["layers"]
    curve = layer["curve"]
    assert len(curve["ranks"]) == answers.CURVE_POINTS
    assert (curve["ranks"][0], curve["ranks"][-1]) == (0, 2_999)
    assert curve["counts"] == np.sort(saved)[::-1][curve["ranks"]].tolist()
    assert saved[curve["slots"]].tolist() == curve["counts"]


def test_a_slot_has_its_load_over_time_and_when_it_was_last_drawn(runs: Path) -> None:
    saved = np.load(runs / "a/usage.npz")
    counts = saved["counts"][:, 2]
    client = served(runs)
    slot = int(np.flatnonzero(counts[-1] == 0)[0])
    found = get(client, "slot", run="a", counted="training", layer=2, slot=slot, window=8)
    assert found["layer"] == "moe/01"
    assert found["counts"] == counts[:, slot].tolist()
    np.testing.assert_allclose(found["loads"], 6 * counts[:, slot] / counts.sum(1), rtol=1e-5)
    assert found["last_drawn"] == EVERY * (1 + np.flatnonzero(counts[:, slot])[-1])
    assert found["probe"] is None
    window = get(client, "window", run="a", counted="training", window=8)["layers"][2]
    named = {row["since"] for row in window["dead_slots"] if str(slot) in row["slots"]}
    assert named <= {found["last_drawn"]}


def test_a_slot_has_the_tokens_of_the_probe_that_it_takes(tmp_path: Path) -> None:
    layers = [Layer("experts", 3, 2)]
    run = write_counted(tmp_path / "a", layers, [[np.array([4, 4, 4])]] * 3)
    ids = np.array([[[[0, 1], [0, 2], [1, 2]]], [[[0, 1], [0, -1], [0, 2]]]])
    domains, names = np.array([0, 1, 1]), np.array(["prose", "<b>code</b>"])
    counts = np.zeros((2, 1, 3, 2), dtype=np.int64)
    for e, layer, token, choice in np.ndindex(ids.shape):
        if (expert := ids[e, layer, token, choice]) >= 0:
            counts[e, layer, expert, domains[token]] += 1
    np.savez(
        run / "probe.npz",
        ids=ids,
        steps=np.array([10, 30]),
        token_ids=np.array([65, 66, 66]),
        domains=domains,
        domain_names=names,
        domain_counts=counts,
    )
    client = served(tmp_path)
    assert get(client, "run", run="a", counted="training")["has_probe"]
    where = {"run": "a", "counted": "training", "layer": 0}
    probe = get(client, "slot", **where, slot=0, window=2)["probe"]
    assert (probe["step"], probe["taken"], probe["tokens"]) == (30, 3, 3)
    assert probe["top"] == [
        {"id": 66, "text": None, "taken": 2, "tokens": 2},
        {"id": 65, "text": None, "taken": 1, "tokens": 1},
    ]
    assert probe["domains"] == [
        {"name": "<b>code</b>", "taken": 2, "tokens": 2},
        {"name": "prose", "taken": 1, "tokens": 1},
    ]
    # the last evaluation up to the step that is shown
    assert get(client, "slot", **where, slot=0, window=1)["probe"]["step"] == 10
    assert get(client, "slot", **where, slot=2, window=0)["probe"]["taken"] == 2


def test_runs_are_compared_by_the_means_over_their_layers(runs: Path) -> None:
    client = served(runs)
    run = get(client, "run", run="a", counted="training")
    (found,) = get(client, "series", run=["a"], counted="training")["runs"]
    assert found["points"] == run["points"]
    own = [layer["measures"]["used"] for layer in run["layers"] if layer["kind"] == "experts"]
    np.testing.assert_allclose(found["kinds"]["experts"]["used"], np.mean(own, 0), rtol=1e-5)
    assert found["kinds"].keys() == found["chance"].keys() == {"experts", "kept"}


WELL = {"run": "a", "counted": "training", "layer": "0", "slot": "0", "window": "0"}


@pytest.mark.parametrize(
    ("status", "wrong"),
    [
        (404, {"run": "b"}),
        (404, {"run": ""}),
        (404, {"run": "../private"}),
        (404, {"run": "/etc"}),
        (404, {"run": "a/../../private"}),
        (404, {"run": "a\0"}),
        (400, {"run": ["a", "a"]}),
        (400, {"run": []}),
        (400, {"counted": "x"}),
        (400, {"counted": ""}),
        (400, {"layer": "-1"}),
        (400, {"layer": "1.5"}),
        (400, {"layer": "٣"}),
        (400, {"layer": "9" * 5_000}),
        (404, {"layer": "4"}),
        (404, {"slot": "6"}),
        (404, {"window": "9"}),
        (400, {"window": []}),
        (400, {"more": "1"}),
        (400, {"run": "x" * 200_000}),
    ],
)
def test_a_wrong_question_is_one_line(runs: Path, status: int, wrong: dict[str, Any]) -> None:
    shutil.copytree(runs / "a", runs.parent / "private")
    found = get(served(runs), "slot", status, **(WELL | wrong))
    assert found.keys() == {"error"}
    assert "\n" not in found["error"]
    assert len(found["error"]) < 300


def test_only_questions_are_answered(runs: Path) -> None:
    client = served(runs)
    assert client.post("/data/plugin/usage/runs").status_code == 405
    assert client.head("/data/plugin/usage/runs").data == b""
    too_many = {"run": ["a"] * (answers.MOST_COMPARED + 1), "counted": "training"}
    get(client, "series", 400, **too_many)
    get(client, "series", 400, counted="training")


def test_a_broken_run_is_one_line_and_the_others_are_shown(runs: Path) -> None:
    (runs / "a/meta.json").write_text("{")
    (runs / "sweep/codes/vq/seed0/usage.npz").write_bytes(b"no archive")
    client = served(runs)
    listed = {run["name"]: run for run in get(client, "runs")["runs"]}
    assert "meta.json" in listed["a"]["error"]
    # without meta.json every row is a layer
    names = [layer["name"] for layer in get(client, "run", run="a", counted="training")["layers"]]
    assert names == [f"layer {i:02d}" for i in range(4)]
    broken = get(client, "run", 422, run="sweep/codes/vq/seed0", counted="training")
    assert "usage.npz" in broken["error"]
    both = [f"sweep/codes/vq/seed{i}" for i in range(2)]
    first, second = get(client, "series", run=both, counted="training")["runs"]
    assert "usage.npz" in first["error"]
    assert "codes" in second["kinds"]


@pytest.mark.parametrize(
    "arrays",
    [
        {"steps": [20, 10], "counts": np.ones((2, 1, 4))},
        {"steps": [10], "counts": np.ones((2, 1, 4))},
        {"steps": [-1, 1], "counts": np.ones((2, 1, 4))},
        {"steps": [1, 2], "counts": -np.ones((2, 1, 4))},
        {"steps": [1, 2], "counts": np.ones((2, 2, 4))},
        {"steps": [1, 2], "counts": np.ones((2, 1, 3))},
        {"steps": [1, 2], "counts": np.full((2, 1, 4), 2**62)},
    ],
)
def test_counts_that_are_none_are_refused(arrays: dict[str, Any], tmp_path: Path) -> None:
    run = write_counted(tmp_path / "a", [Layer("experts", 4, 1)], [[np.arange(4)]])
    steps, counts = (np.array(arrays[name]).astype(np.int64) for name in ("steps", "counts"))
    np.savez(run / "usage.npz", steps=steps, counts=counts)
    assert "usage.npz" in get(served(tmp_path), "run", 422, run="a", counted="training")["error"]


def test_nothing_outside_of_a_run_is_read(runs: Path) -> None:
    layers = [Layer("experts", 4, 1)]
    private = write_counted(runs.parent / "private", layers, [[np.arange(4)]], arm="secret")
    (runs / "link").symlink_to(private)
    (runs / "b").mkdir()
    for name in ("usage.npz", "meta.json"):
        (runs / "b" / name).symlink_to(private / name)
    client = served(runs)
    listed = {run["name"]: run for run in get(client, "runs")["runs"]}
    assert "link" not in listed
    assert "secret" not in json.dumps(listed)
    assert "is a link out of" in get(client, "run", 422, run="b", counted="training")["error"]


def test_names_of_folders_are_safe_to_show_and_lead_to_their_own_folder(tmp_path: Path) -> None:
    layers = [Layer("experts", 2, 1)]
    for i, name in enumerate(("x\x1b[2J", "x\u202ey", "a  b", "a b")):
        write_counted(tmp_path / name, layers, [[np.array([1, i])]], arm="<script>")
    client = served(tmp_path)
    names = [run["name"] for run in get(client, "runs")["runs"]]
    assert len(set(names)) == 4
    assert not {"\x1b", "\u202e"} & set("".join(names))
    found = [
        get(client, "window", run=name, counted="training", window=0)["layers"][0]["counts"][1]
        for name in names
    ]
    assert sorted(found) == [0, 1, 2, 3]


def test_a_run_that_goes_on_is_another_version_and_unchanged_files_are_read_once(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    for name in ("read_meta", "read_windows"):
        real = getattr(folders, name)
        monkeypatch.setattr(
            folders, name, lambda *a, _n=name, _r=real, **k: (read.append(_n), _r(*a, **k))[1]
        )
    client = served(runs)
    before = get(client, "runs")["runs"][0]["version"]
    for _ in range(3):
        get(client, "runs")
        get(client, "run", run="a", counted="training")
        get(client, "series", run=["a"], counted="training")
    assert sorted(read) == ["read_meta"] * 3 + ["read_windows"] * 2  # the two kinds of counts
    saved = dict(np.load(runs / "a/usage.npz"))
    saved["steps"] = np.append(saved["steps"], 1_000)
    saved["counts"] = np.append(saved["counts"], saved["counts"][-1:], axis=0)
    np.savez(runs / "a/new.npz", **saved)
    os.replace(runs / "a/new.npz", runs / "a/usage.npz")
    assert get(client, "runs")["runs"][0]["version"] != before
    assert get(client, "run", run="a", counted="training")["steps"][-1] == 1_000


def test_runs_of_others_with_held_out_counts_alone_are_served(tmp_path: Path) -> None:
    write_run(tmp_path / "a", EXPERTS_ARMS[0], 0, experts=True)
    client = served(tmp_path)
    get(client, "run", 404, run="a", counted="training")
    run = get(client, "run", run="a", counted="held_out")
    assert run["counted"] == ["held_out"]
    assert run["has_probe"]


def test_answers_are_bounded_however_long_a_run_is(tmp_path: Path) -> None:
    run = write_counted(tmp_path / "a", [Layer("experts", 4, 1)], [[np.arange(4)]])
    steps = np.arange(1, 3_001)
    np.savez(run / "usage.npz", steps=steps, counts=np.ones((3_000, 1, 4), dtype=np.int64))
    client = served(tmp_path)
    found = get(client, "run", run="a", counted="training")
    assert len(found["points"]) == answers.POINTS
    assert (found["points"][0], found["points"][-1]) == (1, 3_000)
    (means,) = get(client, "series", run=["a"], counted="training")["runs"]
    assert len(means["points"]) == answers.POINTS_COMPARED


def test_more_runs_than_are_listed_are_told(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MOST_RUNS", 2)
    found = get(served(runs), "runs")
    assert (len(found["runs"]), found["left_out"]) == (2, 1)


def test_there_is_no_tab_where_what_it_needs_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "find_spec", lambda name: None if name == "pydantic" else name)
    assert UsageTabLoader().load(context(tmp_path)) is None


def test_a_tensorboard_over_no_folder_has_no_such_tab() -> None:
    assert not UsageTab(context("")).is_active()
