"""The report of made-up sweeps: known effects are found, nothing is dropped, numbers agree."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
from scipy import stats as reference

from simvq_moe.analysis.comparison import compute
from simvq_moe.analysis.run_folders import find, read_record
from simvq_moe.core.usage import null_usage, usage
from simvq_moe.errors import ConfigError
from simvq_moe.records.printing import difference, mean_and_sd, number, percent, probability
from simvq_moe.reports.report import report
from tests.reports.printed import missing
from tests.reports.synthetic import CODES_ARMS, FakeArm, write_meta, write_run, write_sweep


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
    """What stands in cells and sentences, and every address the page refers to."""

    UNREAD = ("svg", "style", "pre", "code", "title")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.inside: list[str] = []
        self.section = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "section":
            self.section = dict(attrs).get("id") or ""
        if tag in self.UNREAD:
            self.inside.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        read = not self.inside and self.section not in ("configuration", "reproduce", "curves")
        if read and data.strip():
            self.texts.append(data)


def test_every_printed_number_stands_in_the_json(small: Path, content: dict[str, Any]):
    for name in ("report.html", "report.md"):
        absent, printed = missing(printed_texts((small / name).read_text()), content)
        assert not absent
        assert printed > 500


def printed_texts(text: str) -> list[str]:
    """Cells and sentences of a report, without figures, commands and configs."""
    if not text.startswith("<!doctype"):
        text = text.partition("## How to reproduce")[0]
        return [cell for line in text.splitlines() for cell in line.split("|")]
    return Page(text).texts


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
    group = compute(find([sweep]).groups, tmp_path).as_json()["groups"][0]
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


def test_measures_of_tasks_of_lm_eval_are_in_the_numbers_and_have_a_table(tmp_path: Path):
    sweep = write_sweep(tmp_path / "sweep", seeds=1, codes=KNOWN, experts=())
    for i, file in enumerate(sorted(sweep.glob("codes/*/seed0/summary.json"))):
        summary = json.loads(file.read_text()) | {"eval/hamlet/acc": 0.25 + i / 8}
        file.write_text(json.dumps(summary))
    found = report([sweep], tmp_path / "out")
    group = json.loads((tmp_path / "out" / "report.json").read_text())["groups"][0]
    assert sorted(arm["values"]["eval/hamlet/acc"] for arm in group["arms"]) == [[0.25], [0.375]]
    page = found.html.read_text()
    assert page.count("Tasks of lm-eval") == 1
    assert page.count("hamlet accuracy") == 1
    assert "37.5 %" in page


def test_a_torn_line_and_torn_files_of_a_killed_run_are_left_out(tmp_path: Path):
    run = tmp_path / "killed"
    write_run(run, KNOWN[0], 0)
    (run / "summary.json").unlink()
    write_meta(run, KNOWN[0], 0, status="running")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 900, "train/lo')
    (run / "usage.npz").write_bytes((run / "usage.npz").read_bytes()[:100])
    (run / "samples/val_000900.png").write_bytes(b"\x89PNG torn")
    found = read_record(run)
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
    steps, values = read_record(run).series("train/loss")
    assert len(steps) == 8
    assert values[-1] == 42.0


def test_runs_without_a_sweep_are_grouped_by_task_and_arm(tmp_path: Path):
    for seed in range(2):
        for arm in KNOWN:
            write_run(tmp_path / f"runs/{arm.name}{seed}", arm, seed)
        write_run(tmp_path / f"runs/moe{seed}", KNOWN[0], seed, experts=True)
    groups = find([tmp_path / "runs"]).groups
    assert [group.name for group in groups] == ["image_tokenizer", "language_model"]
    assert groups[0].baseline == "better"
    assert "sorts first" in groups[0].notes
    assert groups[0].outcomes == ("val/mse", "val/codes/used")
    assert groups[1].outcomes == ("val/bits_per_byte",)
    assert len(report([tmp_path / "runs"], tmp_path / "out").table.splitlines()) > 6


def test_runs_of_the_same_arm_and_seed_are_kept_apart(tmp_path: Path):
    write_run(tmp_path / "runs/first", KNOWN[0], 0)
    write_run(tmp_path / "runs/second", KNOWN[0], 0)
    (group,) = find([tmp_path / "runs"]).groups
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
    # what rounds to nothing has no sign
    assert difference("val/moe/mean/max_vio", -0.001) == "0.00"
    assert percent(-0.0001) == percent(0.0001) == "0.0 %"
    assert percent(-0.0006) == "−0.1 %"
    assert percent(0.0006) == "+0.1 %"
    assert probability(2e-6) == "<\u00a00.0001"
    assert probability(2 / 2**6) == "0.0312"


def test_equivalence_is_tested_within_the_margin_of_the_measure(tmp_path: Path):
    same = (FakeArm("base", "base", 2.3, 0.3), FakeArm("same", "same", 2.3, 0.3))
    write_sweep(tmp_path / "s", seeds=6, noise=3e-4, codes=(), experts=same)
    written = report([tmp_path / "s"], tmp_path / "out")
    (pair, *others) = json.loads(written.json.read_text())["groups"][0]["paired"]
    bits = {}
    for arm in ("base", "same"):
        files = [tmp_path / f"s/experts/{arm}/seed{i}/summary.json" for i in range(6)]
        bits[arm] = np.array([json.loads(f.read_text())["val/bits_per_byte"] for f in files])
    tests = [
        reference.ttest_1samp(bits["same"] - bits["base"], bound, alternative=side)[1]
        for bound, side in ((-0.005, "greater"), (0.005, "less"))
    ]
    assert pair["margin"] == 0.005
    assert pair["p_equivalent"] == pytest.approx(np.max(tests))
    assert pair["p_equivalent"] < 0.05
    assert all(other["p_equivalent"] is None for other in others)
    assert "p equivalent (± 0.005)" in written.html.read_text()


def test_every_paired_number_follows_from_the_run_directories(small: Path, content: dict[str, Any]):
    for group in content["groups"]:
        for pair in group["paired"]:
            found = {}
            for name in (pair["arm"], group["baseline"]):
                for seed in group["seeds"]:
                    run = small.parent / f"sweep/{group['name']}/{name}/seed{seed}/summary.json"
                    if run.is_file():
                        found[name, seed] = json.loads(run.read_text())[pair["metric"]]
            expected = [
                found[pair["arm"], s] - found[group["baseline"], s]
                if {(pair["arm"], s), (group["baseline"], s)} <= found.keys()
                else None
                for s in group["seeds"]
            ]
            known = [d for d in expected if d is not None]
            assert pair["differences"] == pytest.approx(expected)
            assert pair["mean"] == pytest.approx(np.mean(known))
            assert pair["n"] == len(known)
            assert pair["p_min"] == 2 / 2 ** len(known)
            assert pair["agree"] == sum(d * np.mean(known) > 0 for d in known)


def test_figures_draw_what_the_run_directories_hold(small: Path, content: dict[str, Any]):
    experts = content["groups"][1]
    sweep = small.parent / "sweep/experts"
    counts = np.load(sweep / "aux/seed0/usage.npz")["val_counts"][-1]
    loads = next(one for one in experts["loads"] if one["arm"] == "aux")
    shares = counts / counts.sum(1, keepdims=True)
    np.testing.assert_allclose(loads["layers"], 64 * shares, rtol=1e-4)
    profile = next(one for one in experts["profiles"] if one["arm"] == "aux")
    ranked = 64 * np.sort(shares, axis=1)[:, ::-1].mean(0)
    np.testing.assert_allclose(profile["loads"], ranked[np.array(profile["ranks"]) - 1], rtol=1e-4)
    curve = next(c for c in experts["curves"] if (c["metric"], c["arm"]) == ("train/loss", "aux"))
    files = [sweep / f"aux/seed{seed}/metrics.jsonl" for seed in (0, 1)]
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    for run, logged in zip(curve["runs"], lines, strict=True):
        assert run["steps"] == [line["step"] for line in logged]
        np.testing.assert_allclose(run["values"], [x["train/loss"] for x in logged], rtol=1e-4)
    moved = [c for c in experts["curves"] if c["metric"] == "bank/experts.down/indirect_movement"]
    assert {curve["arm"] for curve in moved} == {"expert-out", "router-qw"}
    np.testing.assert_allclose(moved[0]["mean"], 0.21)


def test_co_activation_and_domains_are_counted_in_the_probe(small: Path, content: dict[str, Any]):
    found = content["groups"][1]["routings"][0]
    probe = np.load(small.parent / "sweep/experts/base/seed0/probe.npz")
    ids, domains = probe["ids"][-1, 1], probe["domains"]
    a, b = found["experts"][:2]
    has_a, has_b = ((ids == one).any(1) for one in (a, b))
    assert found["layer"] == 1
    together = (has_a & has_b).sum() / has_a.sum() * 63 / 3
    assert found["co_activation"][0][1] == pytest.approx(together, rel=5e-3)
    share = has_a[domains == 2].sum() / (domains == 2).sum() * 64 / 4
    assert found["specialization"][2][0] == pytest.approx(share, rel=5e-3)


def test_sounds_and_texts_are_part_of_the_page(tmp_path: Path):
    write_run(tmp_path / "runs/a", KNOWN[0], 0)
    write_run(tmp_path / "runs/b", KNOWN[1], 0)
    for name in ("a", "b"):
        shutil.rmtree(tmp_path / f"runs/{name}/samples")
        folder = tmp_path / f"runs/{name}/samples/val_000800"
        folder.mkdir(parents=True)
        for kind in ("original", "reconstruction"):
            soundfile.write(folder / f"0_{kind}.wav", np.zeros(800), 16_000)
    write_run(tmp_path / "runs/c", KNOWN[0], 0, experts=True)
    (tmp_path / "runs/c/samples").mkdir()
    (tmp_path / "runs/c/samples/val_000800.txt").write_text("def <b>:\n    pass")
    html = report([tmp_path / "runs"], tmp_path / "out").html.read_text()
    assert html.count('<audio controls preload="none" src="data:audio/wav;base64,') == 4
    assert "def &lt;b&gt;:\n    pass" in html


def test_holm_goes_over_the_primary_tests_of_all_questions_of_a_sweep(tmp_path: Path):
    write_sweep(tmp_path, seeds=8, primary={"simvq": "val/codes/used"})
    file = tmp_path / "sweep.json"
    content = json.loads(file.read_text())
    content["groups"][1]["primary"] = {"aux": "val/bits_per_byte"}
    file.write_text(json.dumps(content))
    results = compute(find([tmp_path]).groups, tmp_path)
    tests = [pair for group in results.groups for pair in group.paired if pair.primary]
    assert [pair.arm for pair in tests] == ["simvq", "aux"]
    assert [pair.tests for pair in tests] == [2, 2]
    ps = [pair.p for pair in tests]
    assert all(p is not None for p in ps)
    low, high = sorted(p or 0.0 for p in ps)
    adjusted = sorted(pair.p_holm or 0.0 for pair in tests)
    assert adjusted == pytest.approx([2 * low, max(2 * low, high)])
    assert {group.pairs_needed for group in results.groups} == {7}


def test_the_best_of_every_column_is_marked_and_named_controls_included(
    small: Path, content: dict[str, Any]
):
    codes = next(group for group in content["groups"] if group["name"] == "codes")
    means = {arm["label"]: arm["mean"]["val/mse"] for arm in codes["arms"] if arm["mean"]}
    best = min(means, key=lambda label: means[label])
    assert best == "VQ, width 4"
    text = (small / "report.md").read_text()
    assert f"MSE {number('val/mse', means[best])}, {best};" in text
    row = next(line for line in text.splitlines() if line.startswith("| VQ, width 4<br>"))
    assert f"| **{number('val/mse', means[best])} ±" in row
    others = [line for line in text.splitlines() if line.startswith("| VQ<br>")]
    assert not any("**" in line for line in others[:1])


def test_differences_are_drawn_first_and_lie_in_a_file_for_markdown(small: Path):
    page, text = ((small / name).read_text() for name in ("report.html", "report.md"))
    answers = page[page.index('<section id="answers">') :]
    assert answers.index('class="scroll forest"') < answers.index("Best of all arms")
    assert text.count("](forest-1.svg)") == text.count("](forest-2.svg)") == 1
    for i in (1, 2):
        drawn = (small / f"forest-{i}.svg").read_text()
        assert ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(--" not in drawn
        assert "MSE ↓" in drawn or "bits/byte ↓" in drawn
    # each measure is defined once, where it first stands
    meaning = "Share of slots (codes or experts) that were drawn at least once."
    assert page.count(meaning) == text.count(meaning) == 1
