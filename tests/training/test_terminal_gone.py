"""A run whose terminal goes loses no step of its work."""

from __future__ import annotations

import io
import json
import signal
import sys
import time
from pathlib import Path

import pytest

from simvq_moe.runs import checkpoint
from simvq_moe.terminal import unheard
from simvq_moe.training.process import stop_signals
from tests.launching import Forked, metrics, wait_until

FLAGS = (
    *("--quantizer.codes", "16", "--quantizer.width", "4", "--image_tokenizer.hidden", "4"),
    *("--data.crops", "64", "--data.held_out_crops", "18", "--train.batch_size", "8"),
    *("--train.steps", "100000", "--train.save_every", "100000", "--train.eval_every", "100000"),
    *("--train.log_every", "1", "--name", "run"),
)


def test_a_run_that_nobody_hears_goes_on_and_saves_once_it_is_told_to_stop(tmp_path: Path) -> None:
    process = Forked("train", *FLAGS, cwd=tmp_path)
    run_dir = tmp_path / "runs" / "run"
    records = run_dir / "metrics.jsonl"
    with process.stdout:
        wait_until(process, lambda: records.exists() and len(metrics(run_dir)) > 0)
        process.stderr.close()
        until = time.monotonic() + 5  # lines of progress are two seconds apart
        wait_until(process, lambda: time.monotonic() > until)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 130
    steps = checkpoint.committed_steps(run_dir / "checkpoints")
    assert steps == [metrics(run_dir)[-1]["step"]]
    assert json.loads((run_dir / "meta.json").read_text())["status"] == "interrupted"


class Deserted(io.TextIOBase):
    """A stream without a reader."""

    def write(self, _: str, /) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError

    def isatty(self) -> bool:
        return True


def test_what_is_told_to_nobody_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", deserted := Deserted())
    with unheard():
        print("a word", file=sys.stderr, flush=True)
        assert sys.stderr.isatty()
    assert sys.stderr is deserted


def test_nohup_has_its_way() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with stop_signals() as stop_asked:
            assert not stop_asked()
            signal.raise_signal(signal.SIGHUP)
            assert stop_asked()
    finally:
        signal.signal(signal.SIGHUP, before)
