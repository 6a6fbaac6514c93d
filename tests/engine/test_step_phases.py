"""The time of a step is split without overlap, and a trace shows the same phases."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from simvq_moe.config.checks import check
from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.engine.devices import peak_flops
from simvq_moe.engine.step_phases import PHASES, Phases, profiled
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from tests.launching import ROOT, metrics
from tests.short_training import train_flags
from tests.two_ranks import TwoRanks

LM = (
    *("--task", "language_model", "--data.source", str(ROOT / "tests" / "moe")),
    *("--data.vocabulary", "300", "--data.context", "8", "--language_model.layers", "1"),
    *(
        "--moe.experts",
        "4",
        "--moe.top_k",
        "2",
        "--train.batch_size",
        "4",
        "--train.log_every",
        "2",
    ),
    *("--train.steps", "6", "--train.eval_every", "6", "--train.probe_tokens", "0"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, world: World) -> tuple[Path, str]:
    """A run with a trace and a known peak, and what it printed."""
    printed = io.StringIO()
    flags = (*LM, "--train.profile", "True", "--train.peak_flops", "1e12")
    with contextlib.redirect_stderr(printed):
        run_dir = train_flags(world, tmp_path_factory.mktemp("phases"), *flags)
    return run_dir, printed.getvalue()


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_time_inside_another_phase_is_taken_off_that_one() -> None:
    phases = Phases(torch.device("cpu"))
    began = time.perf_counter()
    with phases.phase("backward"), phases.phase("communication"):
        time.sleep(0.02)
    whole = time.perf_counter() - began
    taken = phases.take()
    assert taken["communication"] >= 0.02
    assert 0 < taken["backward"] <= whole - taken["communication"]
    assert set(phases.take().values()) == {0.0}


def test_collectives_within_a_phase_are_communication_and_torch_is_left_as_it_was(
    world: World,
) -> None:
    del world
    phases = Phases(torch.device("cpu"))
    function = dist.all_reduce
    with phases.collectives_timed():
        dist.all_reduce(torch.ones(3))
        assert phases.take()["communication"] == 0
        with phases.phase("backward"):
            dist.all_reduce(torch.ones(3))
        assert phases.take()["communication"] > 0
    assert dist.all_reduce is function


def test_the_phases_of_a_window_add_up_to_no_more_than_its_steps(
    trained: tuple[Path, str],
) -> None:
    for line in lines(trained[0]):
        seconds = [line[f"time/{phase}"] for phase in PHASES]
        assert all(s > 0 for s in seconds)
        assert sum(seconds) <= line["time/step"]
        assert line["memory/peak_mib"] > 1


def test_mfu_is_the_share_of_the_peak_that_the_flops_of_the_tokens_take(
    trained: tuple[Path, str],
) -> None:
    from simvq_moe.costs.flops import flops_per_token
    from simvq_moe.models.language_model import LanguageModel
    from simvq_moe.tasks.registry import build_model

    model = build_model(with_flags(Config(), LM, "train"))
    assert isinstance(model, LanguageModel)
    for line in lines(trained[0]):
        expected = line["speed/tokens_per_s"] * flops_per_token(model, 32) / 1e12
        assert line["speed/mfu"] == pytest.approx(expected)


def test_a_trace_names_every_phase_and_one_line_says_where_it_is(
    trained: tuple[Path, str],
) -> None:
    run_dir, printed = trained
    (trace,) = (run_dir / "profile").glob("*.pt.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert set(PHASES) <= {event.get("name") for event in events}
    assert sum(event.get("name") == "forward" for event in events) == 3
    assert printed.count(str(run_dir / "profile")) == 1


def test_without_a_folder_nothing_is_traced() -> None:
    with profiled(None) as step_done:
        step_done()
        assert not torch.autograd.profiler._is_profiler_enabled


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--train.profile True --train.steps 5", "train.profile True with train.steps 5"),
        ("--train.peak_flops 0", "train.peak_flops 0.0"),
    ],
)
def test_what_can_not_be_measured_is_refused(flags: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(with_flags(Config(), flags.split(), "train"))


def test_the_peak_of_a_gpu_is_found_by_its_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "fp32") == 19.5e12
    assert peak_flops("NVIDIA A10", "bf16") == 125e12
    assert peak_flops("another device", "bf16") is None


@pytest.mark.distributed
def test_ranks_that_share_experts_say_how_long_they_communicate(
    tmp_path: Path, two_ranks: TwoRanks
) -> None:
    run_dir, _ = two_ranks(train_flags, tmp_path, *LM, "--moe.expert_parallel", "2")
    assert not any("time/step" in line for line in metrics(run_dir))  # no two runs share it
    for line in lines(run_dir):
        assert 0 < line["time/communication"] < line["time/step"]
