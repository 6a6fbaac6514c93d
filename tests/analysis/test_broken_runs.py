"""Run folders of strangers: one that is broken is shown as such beside the others, nothing outside
of it is read, and nothing in it reaches a terminal or a page as more than text."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from simvq_moe import cli
from simvq_moe.analysis.run_folders import find, read_record
from simvq_moe.errors import ConfigError
from simvq_moe.reports.dashboard import link_runs
from simvq_moe.reports.report import report
from simvq_moe.reports.watch import watch
from tests.reports.hostile import write_small_run

DEEP = "[" * 100_000
HUGE = "1" + "0" * 400
BROKEN = {
    "config.yaml that is no YAML": ("config.yaml", "a: ["),
    "config.yaml that is a list": ("config.yaml", "- 1"),
    "config.yaml that is not UTF-8": ("config.yaml", b"\xff\xfe"),
    "deep config.yaml": ("config.yaml", "a: " + DEEP),
    "a word as seed": ("config.yaml", "seed: x"),
    "a huge seed": ("config.yaml", f"seed: {HUGE}"),
    "a word as steps": ("config.yaml", "train: {steps: x}"),
    "a list as task": ("config.yaml", "task: [1]"),
    "meta.json that is not UTF-8": ("meta.json", b"\xff"),
    "meta.json of nothing": ("meta.json", ""),
    "deep meta.json": ("meta.json", DEEP),
    "a list as status": ("meta.json", '{"status": ["x"]}'),
    "another status": ("meta.json", '{"status": "x"}'),
    "a number as error": ("meta.json", '{"status": "failed", "error": 5}'),
    "a word as layer": ("meta.json", '{"layers": ["x"]}'),
    "a layer of no slots": ("meta.json", '{"layers": [{"kind": "codes", "slots": 0}]}'),
    "a layer of huge slots": ("meta.json", f'{{"layers": [{{"kind": "codes", "slots": {HUGE}}}]}}'),
    "a word as metric": ("metrics.jsonl", '{"step": 1, "train/loss": "x"}\n'),
    "a metric that is null": ("metrics.jsonl", '{"step": 1, "codes/used": null}\n'),
    "a step below 0": ("metrics.jsonl", '{"step": -1}\n'),
    "an infinite step": ("metrics.jsonl", '{"step": 1e999}\n'),
    "a step that is nan": ("metrics.jsonl", '{"step": NaN}\n'),
    "a metric beyond all bounds": ("metrics.jsonl", '{"step": 1, "train/loss": 1e300}\n'),
    "a deep line": ("metrics.jsonl", DEEP + "\n"),
    "a list as line": ("metrics.jsonl", "[1]\n"),
    "a surrogate alone": ("metrics.jsonl", '{"step": 1, "\\ud800": 1}\n'),
}
PLANS = ['{"groups": [{}]}', b"\xff", '{"groups": 5}', DEEP, "{}"]


def put(run: Path, name: str, content: str | bytes) -> None:
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def watched(folder: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    assert watch(folder, once=True, console=console) == 0
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_run_is_named_with_its_reason_and_the_others_are_shown(what: str, tmp_path: Path):
    name, content = BROKEN[what]
    write_small_run(tmp_path / "runs/well")
    put(write_small_run(tmp_path / "runs/ill"), name, content)
    found = find([tmp_path / "runs"])
    assert [arm.name for group in found.groups for arm in group.arms] == ["well"]
    (broken,) = found.broken
    assert broken.status == "broken"
    assert broken.error is not None
    assert f"ill/{name}" in broken.error
    assert "\n" not in broken.error
    rows = [line.split()[:2] for line in watched(tmp_path / "runs").splitlines()[1:3]]
    assert rows == [["ill", "broken"], ["well", "finished"]]
    assert f"ill/{name}" in watched(tmp_path / "runs").replace("\n", "")


def test_a_broken_run_alone_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    put(write_small_run(tmp_path / "ill"), "meta.json", DEEP)
    assert cli.main(["report", str(tmp_path / "ill"), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ill/meta.json" in line
    assert not (tmp_path / "out").exists()


def test_a_broken_run_is_in_every_form_of_the_report(tmp_path: Path):
    write_small_run(tmp_path / "runs/well")
    put(write_small_run(tmp_path / "runs/ill"), "metrics.jsonl", "{}\n")
    written = report([tmp_path / "runs"], tmp_path / "out")
    for text in (written.html.read_text(), written.markdown.read_text(), written.table):
        assert "must have a step" in text
    assert json.loads(written.json.read_text())["runs"][1]["status"] == "broken"


@pytest.mark.parametrize("content", PLANS)
def test_runs_are_shown_where_their_plan_is_broken(content: str | bytes, tmp_path: Path):
    write_small_run(tmp_path / "runs/sweep/arm")
    put(tmp_path / "runs/sweep", "sweep.json", content)
    found = find([tmp_path / "runs"])
    assert [arm.name for group in found.groups for arm in group.arms] == ["arm"]
    assert [run.arm for run in found.broken] == ["sweep"]
    text = watched(tmp_path / "runs")
    assert "sweep/arm" in text
    assert "sweep/sweep.json" in text.replace("\n", "")


@pytest.mark.parametrize(
    "arrays",
    [
        {"val_counts": np.zeros((1, 1, 4), dtype=object)},
        {"val_counts": np.array([[[1, -1, 0, 0]]])},
        {"val_counts": np.full((1, 1, 4), 2**62)},
        {"val_counts": np.ones((1, 1, 3), dtype=np.int64)},
        {"val_counts": np.ones((1, 2, 4), dtype=np.int64)},
        {"val_counts": np.ones((1, 1, 4))},
        {"val_counts": np.ones(4, dtype=np.int64)},
    ],
    ids=["objects", "negative", "overflow", "few_slots", "more_layers", "floats", "one_axis"],
)
def test_counts_that_can_not_be_are_left_out_with_the_reason(
    arrays: dict[str, np.ndarray], tmp_path: Path
):
    run = write_small_run(tmp_path / "a")
    np.savez(run / "usage.npz", **arrays)  # pyright: ignore[reportArgumentType]
    found = read_record(run)
    assert (found.status, found.held_out_counts) == ("finished", None)
    assert "usage.npz" in found.left_out[0]
    written = report([run], tmp_path / "out")
    for text in (written.html.read_text(), written.markdown.read_text(), written.table):
        assert "usage.npz" in text


@pytest.mark.parametrize(
    "name", ["meta.json", "summary.json", "config.yaml", "metrics.jsonl", "usage.npz", "sweep.json"]
)
@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "link_out"])
def test_what_is_no_file_of_the_folder_is_not_read(name: str, kind: str, tmp_path: Path):
    run = write_small_run(tmp_path / "runs/a")
    write_small_run(tmp_path / "runs/b")
    (run / name).unlink(missing_ok=True)
    make: dict[str, Callable[[], None]] = {
        "fifo": lambda: os.mkfifo(run / name),
        "folder": lambda: (run / name).mkdir(),
        "loop": lambda: (run / name).symlink_to(name),
        "link_out": lambda: (run / name).symlink_to(secret(tmp_path)),
    }
    make[kind]()
    written = report([tmp_path / "runs"], tmp_path / "out")
    text = written.html.read_text() + written.table + watched(tmp_path / "runs")
    assert name in text.replace("\n", "")
    assert "SECRET" not in text


def secret(folder: Path) -> Path:
    (folder / "secret").write_text("SECRET")
    return folder / "secret"


def test_samples_that_lead_out_of_the_run_are_not_shown(tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "val_000001.txt").write_text("SECRET")
    (elsewhere / "0_x.wav").write_bytes(b"RIFF....WAVESECRET")
    (file := write_small_run(tmp_path / "file")).joinpath("samples/val_000001.txt").symlink_to(
        elsewhere / "val_000001.txt"
    )
    (sounds := write_small_run(tmp_path / "sounds")).joinpath("samples/val_000001").symlink_to(
        elsewhere
    )
    whole = write_small_run(tmp_path / "whole")
    (whole / "samples").rmdir()
    (whole / "samples").symlink_to(elsewhere)
    (inside := write_small_run(tmp_path / "inside")).joinpath("samples/val_000001").mkdir()
    (inside / "samples/val_000001/0_x.wav").symlink_to(elsewhere / "0_x.wav")
    html = report([file, sounds, whole, inside], tmp_path / "out").html.read_text()
    assert "SECRET" not in html
    assert "audio/wav" not in html


@pytest.mark.parametrize("where", ["../private", "/etc", "link", "a/../../private", ""])
def test_a_plan_leads_to_no_folder_outside_of_its_own(where: str, tmp_path: Path):
    write_small_run(tmp_path / "private")
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "link").symlink_to(tmp_path / "private")
    runs = [{"seed": 0, "dir": where, "status": "finished"}]
    group = {"name": "g", "baseline": "a", "outcomes": ["val/mse"]}
    group |= {"arms": [{"name": "a", "runs": runs}]}
    (sweep / "sweep.json").write_text(json.dumps({"name": "s", "groups": [group]}))
    try:
        html = report([sweep], tmp_path / "out").html.read_text()
    except ConfigError:
        return
    assert "is a link out of" in html
    assert "0.5000" not in html


def test_the_dashboard_shows_events_of_nested_runs_and_none_from_elsewhere(tmp_path: Path):
    runs, links = tmp_path / "runs", tmp_path / "links"
    links.mkdir()
    elsewhere = tmp_path / "events.out.tfevents.9"
    elsewhere.write_bytes(b"")
    for name in ("a/b", "a"):
        (runs / name / "tensorboard").mkdir(parents=True)
        (runs / name / "tensorboard/events.out.tfevents.1").write_bytes(b"")
        link_runs(runs, links)
    (runs / "a/tensorboard/events.out.tfevents.2").symlink_to(elsewhere)
    os.mkfifo(runs / "a/tensorboard/events.out.tfevents.3")
    (runs / "c").mkdir()
    (runs / "c/tensorboard").symlink_to(tmp_path)
    link_runs(runs, links)
    found = {str(path.relative_to(links)) for path in links.rglob("*tfevents*")}
    assert found == {"a/events.out.tfevents.1", "a/b/events.out.tfevents.1"}
    (runs / "a/tensorboard/events.out.tfevents.1").unlink()
    link_runs(runs, links)
    assert not (links / "a/events.out.tfevents.1").is_symlink()


@pytest.mark.parametrize("names", [("a", "a/x.tfevents.1"), ("a/x.tfevents.1", "a")])
def test_a_run_named_like_events_of_another_does_not_end_the_dashboard(
    names: tuple[str, str], tmp_path: Path
):
    runs, links = tmp_path / "runs", tmp_path / "links"
    for name in names:
        (runs / name / "tensorboard").mkdir(parents=True)
        (runs / name / "tensorboard/x.tfevents.1").write_bytes(b"")
        link_runs(runs, links)
    link_runs(runs, links)
    assert len(list(links.rglob("x.tfevents.1"))) >= 1


MARKUP = "[bold]x[/] $\\frac$ \x1b]0;owned\x07 \u202e <script>alert(1)</script> ![x](a.b) `|`"


def test_text_of_a_run_is_only_text_everywhere(tmp_path: Path):
    runs = [write_small_run(tmp_path / f"runs/{name}", arm=MARKUP, error=MARKUP) for name in "ab"]
    for run in runs:
        config = json.dumps({"task": MARKUP, "arm": f"{run.name} {MARKUP}", "x": MARKUP})
        (run / "config.yaml").write_text(config)
        lines = [{"step": i, f"bank/00/{MARKUP}": 1.0, "val/mse": 0.5} for i in (1, 2)]
        put(run, "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    put(runs[1], "meta.json", json.dumps({"status": "failed", "error": MARKUP}))
    (runs[1] / "summary.json").unlink()
    (runs[0] / "samples/val_000001.txt").write_text(MARKUP)
    written = report([tmp_path / "runs"], tmp_path / "out")
    html, markdown = written.html.read_text(), written.markdown.read_text()
    for text in (html, markdown, written.table, watched(tmp_path / "runs")):
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "<script" not in html
    assert "<script" not in markdown
    assert "![x](" not in markdown
    assert "[bold]x[/]" in watched(tmp_path / "runs")
    assert "$" in html


@pytest.mark.parametrize("name", ["[bold]x", "a[/]b", "[link=evil.example]x[/link]"])
def test_watch_shows_names_of_folders_as_they_are(name: str, tmp_path: Path):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "meta.json").write_text('{"status": "running"}')
    assert name in watched(tmp_path)


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


@pytest.mark.parametrize("side", [5_000, 13_500, 60_000])
def test_a_picture_of_too_many_pixels_is_not_decoded(side: int, tmp_path: Path):
    run = write_small_run(tmp_path / "a")
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (run / "samples/val_000001.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    html = report([run], tmp_path / "out").html.read_text()
    assert "image/png" not in html
    assert "val_000001.png" in html


def test_a_picture_that_pillow_trips_over_is_named(tmp_path: Path):
    run = write_small_run(tmp_path / "a")
    head = struct.pack(">IIBBBBB", 8, 8, 1, 0, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(bytes(16))), (b"iCCP", b""), (b"IEND", b"")
    body = b"".join(chunk(*part) for part in parts)  # a profile of no bytes: an IndexError
    (run / "samples/val_000001.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert "val_000001.png is no picture" in report([run], tmp_path / "out").html.read_text()


def test_the_first_path_is_the_baseline_or_the_one_that_is_named(tmp_path: Path):
    runs = [write_small_run(tmp_path / name) for name in ("b", "a", "c")]
    (group,) = find(runs).groups
    assert group.baseline == "b"
    assert "given first" in group.notes
    assert [arm.name for arm in group.arms] == ["b", "a", "c"]
    assert find([tmp_path]).groups[0].baseline == "a"
    assert find(runs, "c").groups[0].baseline == "c"
    assert find([tmp_path], str(runs[2])).groups[0].baseline == "c"
    with pytest.raises(ConfigError, match="--baseline d is no arm of these runs: they are a, b, c"):
        find(runs, "d")


def test_runs_of_unequal_length_are_warned_of_in_every_form(tmp_path: Path):
    runs = [write_small_run(tmp_path / "a", steps=4), write_small_run(tmp_path / "b", steps=2)]
    written = report(runs, tmp_path / "out")
    for text in (written.html.read_text(), written.markdown.read_text(), written.table):
        assert "Runs of unequal length are compared: b 2 steps; a 4 steps" in text
    equal = report([runs[0], write_small_run(tmp_path / "c", steps=4)], tmp_path / "equal")
    assert "unequal" not in equal.html.read_text()


def test_a_run_within_another_runs_folder_is_found(tmp_path: Path):
    write_small_run(tmp_path / "a/b")
    write_small_run(tmp_path / "a/samples/c")
    outer = tmp_path / "a"
    for file in ("config.yaml", "meta.json", "metrics.jsonl"):
        (outer / file).write_bytes((outer / "b" / file).read_bytes())
    (group,) = find([tmp_path]).groups
    assert sum(len(arm.runs) for arm in group.arms) == 2
    assert "a/b" in watched(tmp_path)
