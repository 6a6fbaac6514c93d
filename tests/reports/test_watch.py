"""The live table: what it shows of real records, and that it reads only what is new."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from simvq_moe.reports.watch import BARS, Watched, WatchedRun, sparkline
from tests.launching import environment, run

LAYERS = [
    {"kind": "experts", "slots": 8, "top_k": 2},
    {"kind": "experts", "slots": 4, "top_k": 2},
]


def make_run(run_dir: Path, status: str = "running", steps: int = 100) -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(f"train: {{steps: {steps}}}\n")
    content = {
        "status": status,
        "layers": LAYERS,
        "error": "a reason" if status == "failed" else None,
    }
    (run_dir / "meta.json").write_text(json.dumps(content))
    return run_dir


def line(step: int, used: float = 1.0) -> str:
    usage = {
        "moe/mean/used": used,
        "moe/mean/max_vio": 1.5,
        "moe/00/dead": 0.25,
        "moe/01/dead": 0.5,
    }
    rest = {"time": step / 2, "train/loss": 3.0 - step / 100, "speed/tokens_per_s": 12345.6}
    return json.dumps({"step": step, **rest, **usage}) + "\n"


def shown(folder: Path, rows: int | None = None) -> str:
    runs = Watched(folder)
    runs.look()
    console = Console(width=200)
    with console.capture() as capture:
        console.print(runs.show(rows))
    return capture.get()


def test_a_row_tells_progress_usage_dead_slots_and_time_left(tmp_path: Path) -> None:
    made = make_run(tmp_path / "sweep" / "arm" / "seed0")
    (made / "metrics.jsonl").write_text(line(10, 0.1) + line(20, 0.6) + line(30, 0.9))
    row = next(text for text in shown(tmp_path).splitlines() if "seed0" in text)
    # 2 of 8 and 2 of 4 are dead; half a second a step
    assert row.split() == [
        *("sweep/arm/seed0", "running", "30/100", "2.7", "90%", "1.50", "12,346"),
        *("▁▅█", "4/12", "0:35"),
    ]


def test_every_status_is_shown_and_planned_runs_are_pending(tmp_path: Path) -> None:
    for status in ("running", "failed", "interrupted", "finished"):
        made = make_run(tmp_path / "s" / status, status)
        (made / "metrics.jsonl").write_text(line(10))
    runs = [{"dir": name} for name in ("running", "later")]
    (tmp_path / "s" / "sweep.json").write_text(json.dumps({"groups": [{"arms": [{"runs": runs}]}]}))
    text = shown(tmp_path)
    assert [row.split()[:2] for row in text.splitlines()[1:6]] == [
        [f"s/{name}", status]
        for name, status in (
            *(("running", "running"), ("failed", "failed"), ("interrupted", "interrupted")),
            *(("finished", "finished"), ("later", "pending")),
        )
    ]
    assert "1 running, 1 failed, 1 interrupted, 1 finished, 1 pending" in text
    assert "s/failed: a reason" in text
    short = shown(tmp_path, rows=2)
    assert "and 3 more" in short
    assert "s/finished" not in short


def test_only_new_lines_are_read_a_torn_one_waits_and_a_resumed_file_is_read_again(
    tmp_path: Path,
) -> None:
    made = make_run(tmp_path / "a")
    metrics = made / "metrics.jsonl"
    metrics.write_text(line(10, 0.1) + line(20, 0.2))
    watched = WatchedRun(made, "a")
    watched.read()
    at = watched.file[1]
    assert at == metrics.stat().st_size
    with metrics.open("r+") as file:
        # what has been read is not read again, so this is not seen
        file.write("x" * 20)
        file.seek(0, os.SEEK_END)
        file.write(line(30, 0.3)[:15])
    watched.read()
    assert watched.last["step"] == 20
    assert watched.file[1] == at
    with metrics.open("a") as file:
        file.write(line(30, 0.3)[15:])
    watched.read()
    assert watched.used == [0.1, 0.2, 0.3]
    other = made / "other"
    other.write_text(line(10, 0.4))
    other.replace(metrics)
    watched.read()
    assert (watched.used, watched.last["step"]) == ([0.4], 10)


def test_a_run_that_says_running_but_writes_nothing_is_silent(tmp_path: Path) -> None:
    made = make_run(tmp_path / "a")
    (made / "metrics.jsonl").write_text(line(10) + line(20))
    assert "silent" not in shown(tmp_path)
    for file in made.iterdir():
        os.utime(file, (time.time() - 300, time.time() - 300))
    assert "silent 5:0" in shown(tmp_path)


def test_a_sparkline_has_one_scale_and_its_end_is_now() -> None:
    assert sparkline([0.0, 1.0]) == BARS[0] + BARS[-1]
    assert sparkline([]) == ""
    assert sparkline([i / 999 for i in range(1000)], width=8) == BARS
    assert sparkline([0.5] * 5, width=12) == BARS[4] * 5


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    assert "no runs yet" in shown(tmp_path)


def test_without_a_terminal_it_prints_once_and_whole(tmp_path: Path) -> None:
    name = "a_rather_long_name_of_a_sweep/a_rather_long_name_of_a_group/arm/seed0"
    made = make_run(tmp_path / "runs" / name)
    (made / "metrics.jsonl").write_text(line(10))
    found = run("watch", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert name in found.stdout
    assert "10/100" in found.stdout


def test_in_a_terminal_it_refreshes_until_ctrl_c_and_ends_with_0(tmp_path: Path) -> None:
    made = make_run(tmp_path / "runs" / "live")
    (made / "metrics.jsonl").write_text(line(10))
    main, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "simvq_moe", "watch", "runs"],
        cwd=tmp_path,
        env=environment() | {"TERM": "xterm", "COLUMNS": "160", "LINES": "30"},
        stdin=end,
        stdout=end,
        stderr=end,
    )
    os.close(end)
    seen = b""
    try:
        for step in (10, 20):
            if step == 20:
                with (made / "metrics.jsonl").open("a") as file:
                    file.write(line(20))
            until = time.monotonic() + 60
            while f"{step}/100".encode() not in seen and time.monotonic() < until:
                seen += os.read(main, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, seen
    finally:
        process.kill()
        os.close(main)
    assert b"20/100" in seen
