"""The last part of launch/gpu_check.sh: what it runs can run, and its page has every part."""

from __future__ import annotations

import pytest

from simvq_moe.benchmarks.gpu_check import MEMORY, STEPS, machine, memory, page
from simvq_moe.config.checks import check
from simvq_moe.config.flags import with_flags
from simvq_moe.config.loading import merge_files
from simvq_moe.config.schema import Config
from tests.launching import ROOT


@pytest.mark.parametrize("name", MEMORY)
def test_a_variant_whose_memory_is_measured_is_a_config_that_can_run(name: str) -> None:
    quickstart = merge_files(Config, [ROOT / "configs" / "language_quickstart.yaml"])
    check(with_flags(quickstart, [*STEPS, *MEMORY[name]], "train"))


@pytest.mark.slow
def test_the_page_has_the_dry_runs_beside_what_a_gpu_would_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DEVICE", "cpu")
    found = {"machine": machine(), "memory": memory()}
    found["tests"] = {"passed": 2, "skipped": 1, "failed": ["tests.a.test_b"]}
    text = page(found, {"moe": "| a table |"})
    assert "2 passed, 1 skipped, 1 failed." in text
    assert "- failed: tests.a.test_b" in text
    assert "| a table |" in text
    assert all(name in text for name in MEMORY)
