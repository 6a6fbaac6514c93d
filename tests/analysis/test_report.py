"""The report of made-up sweeps: known effects are found, nothing is dropped, numbers agree."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import CODES_ARMS, FakeArm, write_meta, write_run, write_sweep

from simvq_moe.analysis.comparison import compute
from simvq_moe.analysis.measures import difference, mean_and_sd, number
from simvq_moe.analysis.report import report
from simvq_moe.analysis.runs import find_groups, read_run
from simvq_moe.core.usage import null_usage, usage
from simvq_moe.merging import ConfigError


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a sweep with two seeds, one failed run and one that was never started."""
    base = tmp_path_factory.mktemp("small")
    sweep = write_sweep(base / "sweep", seeds=2)
    failed = sweep / "codes/ema/seed1"
    (failed / "summary.json").unlink()
    write_meta(failed, CODES_ARMS[1], 1, status="failed", error="loss became nan at step 420")
    shutil.rmtree(sweep / "experts/slow-router/seed1")
    report([sweep], base / "out")
    return base / "out"


@pytest.fixture(scope="module")
def content(small: Path) -> dict[str, Any]:
    return json.loads((small / "report.json").read_text())


class Page(HTMLParser):
    """Cells of the result table, and every address the page refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.in_results = self.in_cell = False
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.in_results |= tag == "table" and named.get("class") == "results"
        self.in_cell |= self.in_results and tag == "td"
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        self.in_results &= tag != "table"
        self.in_cell &= tag != "td"

    def handle_data(self, data: str) -> None:
        if self.in_cell and data.strip():
            self.cells.append(data.strip())


def numbers(content: Any) -> Iterator[float]:
    if isinstance(content, dict | list):
        for part in content.values() if isinstance(content, dict) else content:
            yield from numbers(part)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield float(content)


def test_every_number_of_the_result_table_stands_in_the_json(small: Path, content: dict[str, Any]):
    page = Page((small / "report.html").read_text())
    known = np.array(list(numbers(content["groups"])))
    printed = [n for cell in page.cells for n in re.findall(r"[−\d][\d,.]*", cell)]
    assert len(printed) > 200
    for text in printed:
        plain = text.replace("−", "-").replace(",", "").rstrip(".")
        decimals = len(plain.partition(".")[2])
        half = 0.5 * 10.0**-decimals + 1e-12
        # shares are printed in percent
        near = np.abs(known - float(plain)) <= half
        assert near.any() or (np.abs(100 * known - float(plain)) <= half).any(), text


def test_values_are_those_of_the_run_directories(small: Path, content: dict[str, Any]):
    codes = content["groups"][0]
    simvq = next(arm for arm in codes["arms"] if arm["name"] == "simvq")
    for i, seed in enumerate(codes["seeds"]):
        run = small.parent / f"sweep/codes/simvq/seed{seed}"
        summary = json.loads((run / "summary.json").read_text())
        assert simvq["values"]["val/mse"][i] == summary["val/mse"]
        counts = np.load(run / "usage.npz")["val_counts"][-1, 0]
        assert simvq["values"]["val/codes/gini"][i] == pytest.approx(usage(counts).gini)
    assert simvq["mean"]["val/mse"] == pytest.approx(np.mean(simvq["values"]["val/mse"]))
    assert simvq["sd"]["val/mse"] == pytest.approx(np.std(simvq["values"]["val/mse"], ddof=1))


def test_the_null_is_that_of_as_many_draws(content: dict[str, Any]):
    codes, experts = (group["null"][0] for group in content["groups"])
    assert codes["draws"] == codes["tokens"] == 65_664
    assert experts["draws"] == 4 * experts["tokens"]
    expected = null_usage(64, experts["draws"])
    assert experts["values"]["val/moe/mean/cv"] == pytest.approx(expected.cv)


def test_the_page_asks_nothing_of_any_other_place(small: Path):
    html = (small / "report.html").read_text()
    for address in Page(html).addresses:
        assert address.startswith(("data:", "#")), address
    for trace in ("<script", "<link", "@import", "url(http", "http-equiv"):
        assert trace not in html
    assert len(html) < 3_000_000


def test_a_failed_and_a_missing_run_are_listed_and_in_no_mean(small: Path, content: dict[str, Any]):
    ema = content["groups"][0]["arms"][1]
    assert ema["status"] == ["finished", "failed"]
    assert ema["n"] == 1
    assert ema["values"]["val/mse"][1] is None
    assert ema["sd"]["val/mse"] is None
    states = {(r["arm"], r["seed"]): (r["status"], r["error"]) for r in content["runs"]}
    assert states["ema", 1] == ("failed", "loss became nan at step 420")
    assert states["slow-router", 1][0] == "missing"
    assert len(content["runs"]) == 18
    for name in ("report.html", "report.md"):
        text = (small / name).read_text()
        assert "loss became nan at step 420" in text
        assert "No pair for EMA-VQ at seed 1 (failed; VQ finished)." in text


def test_fewer_than_six_pairs_are_called_descriptive(small: Path, content: dict[str, Any]):
    for group in content["groups"]:
        assert "nothing can reach p < 0.05" in group["verdict"][0]
        assert "descriptive" in group["verdict"][0]
        assert group["verdict"][0] in (small / "report.md").read_text()


KNOWN = (
    FakeArm("vq", "VQ", 3.0e-3, 0.3),
    FakeArm("better", "better", 2.0e-3, 0.3),
)
SAME = (FakeArm("vq", "VQ", 3.0e-3, 0.3), FakeArm("same", "same", 3.0e-3, 0.3))


def only_pair(tmp_path: Path, arms: tuple[FakeArm, ...]) -> tuple[dict[str, Any], str]:
    sweep = write_sweep(tmp_path / "sweep", seeds=8, noise=0.05, codes=arms, experts=())
    group = compute(find_groups([sweep]), tmp_path).as_json()["groups"][0]
    pair = next(p for p in group["paired"] if p["metric"] == "val/mse")
    return pair, group["verdict"][0]


def test_a_known_effect_is_found(tmp_path: Path):
    pair, verdict = only_pair(tmp_path, KNOWN)
    assert pair["n"] == 8
    assert pair["p"] == pytest.approx(2 / 2**8)
    assert pair["p_holm"] < 0.05
    assert pair["interval"][0] < -1e-3 < pair["interval"][1] < 0
    assert pair["relative"] == pytest.approx(-1 / 3, abs=0.03)
    assert "lower in 8 of 8 pairs" in verdict
    assert "Established after Holm" in verdict


def test_no_effect_is_not_found_and_is_said_as_plainly(tmp_path: Path):
    pair, verdict = only_pair(tmp_path, SAME)
    assert pair["p"] > 0.05
    assert pair["interval"][0] < 0 < pair["interval"][1]
    assert "Not established for same" in verdict
    assert "Established" not in verdict


def test_only_outcomes_are_adjusted(content: dict[str, Any]):
    for pair in content["groups"][0]["paired"]:
        assert (pair["p_holm"] is not None) == (pair["metric"] in ("val/mse", "val/codes/used"))


def test_a_torn_line_and_torn_files_of_a_killed_run_are_left_out(tmp_path: Path):
    run = tmp_path / "killed"
    write_run(run, KNOWN[0], 0)
    (run / "summary.json").unlink()
    write_meta(run, KNOWN[0], 0, status="running")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 900, "train/lo')
    (run / "usage.npz").write_bytes((run / "usage.npz").read_bytes()[:100])
    (run / "samples/val_000900.png").write_bytes(b"\x89PNG torn")
    found = read_run(run)
    assert found.step == 800
    assert found.held_out_counts is None
    assert "val/mse" in found.final
    written = report([run], tmp_path / "out")
    assert "running" in written.html.read_text()


def test_a_resumed_run_repeats_steps_and_its_later_lines_hold(tmp_path: Path):
    run = tmp_path / "run"
    write_run(run, KNOWN[0], 0)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 800, "train/loss": 42.0}\n')
    steps, values = read_run(run).series("train/loss")
    assert len(steps) == 8
    assert values[-1] == 42.0


def test_runs_without_a_sweep_are_grouped_by_task_and_arm(tmp_path: Path):
    for seed in range(2):
        for arm in KNOWN:
            write_run(tmp_path / f"runs/{arm.name}{seed}", arm, seed)
        write_run(tmp_path / f"runs/moe{seed}", KNOWN[0], seed, experts=True)
    groups = find_groups([tmp_path / "runs"])
    assert [group.name for group in groups] == ["image_tokenizer", "language_model"]
    assert groups[0].baseline == "better"
    assert "sorts first" in groups[0].notes
    assert groups[0].outcomes == ("val/mse", "val/codes/used")
    assert groups[1].outcomes == ("val/bits_per_byte",)
    assert len(report([tmp_path / "runs"], tmp_path / "out").table.splitlines()) > 6


def test_runs_of_the_same_arm_and_seed_are_kept_apart(tmp_path: Path):
    write_run(tmp_path / "runs/first", KNOWN[0], 0)
    write_run(tmp_path / "runs/second", KNOWN[0], 0)
    (group,) = find_groups([tmp_path / "runs"])
    assert [arm.name for arm in group.arms] == ["vq (first)", "vq (second)"]


def test_a_usage_measure_missing_in_the_summary_is_recounted(tmp_path: Path):
    run = tmp_path / "run"
    write_run(run, KNOWN[0], 0)
    (run / "summary.json").write_text(json.dumps({"val/mse": 0.003}))
    written = report([run], tmp_path / "out")
    arm = json.loads(written.json.read_text())["groups"][0]["arms"][0]
    counts = np.load(run / "usage.npz")["val_counts"][-1, 0]
    assert arm["values"]["val/codes/entropy"] == [pytest.approx(usage(counts).entropy)]


def test_nothing_but_a_plan_still_makes_a_report(tmp_path: Path):
    sweep = write_sweep(tmp_path / "sweep", seeds=1, codes=KNOWN, experts=())
    shutil.rmtree(sweep / "codes")
    written = report([sweep], tmp_path / "out")
    assert "No pair of finished runs yet" in written.html.read_text()
    assert json.loads(written.json.read_text())["runs"][0]["status"] == "missing"


def test_a_path_that_does_not_exist_or_holds_no_run_is_a_config_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        report([tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(ConfigError, match="no runs found"):
        report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_of_a_run_cannot_become_markup(tmp_path: Path):
    run = tmp_path / "run"
    write_run(run, KNOWN[0], 0)
    (run / "summary.json").unlink()
    write_meta(run, KNOWN[0], 0, status="failed", error="<b>bold</b> & broken")
    html = report([run], tmp_path / "out").html.read_text()
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; broken" in html


def test_numbers_are_printed_with_the_digits_of_their_measure():
    assert number("val/codes/used", 0.9412) == "94.1 %"
    assert number("val/mse", 0.0020612) == "0.002061"
    assert number("val/moe/mean/entropy", None) == "–"
    assert mean_and_sd("val/mse", 0.0020612, 0.0000753) == "0.002061 ± 0.000075"
    assert mean_and_sd("val/codes/used", 0.94, 0.005) == "94.0 ± 0.5 %"
    assert difference("val/codes/used", -0.052) == "−5.2"
    assert difference("val/moe/mean/max_vio", -0.001) == "+0.00"
