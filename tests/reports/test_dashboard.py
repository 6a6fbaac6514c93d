"""TensorBoard's own tabs in Chromium over a sweep of 18 runs: what they ask for and show."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from simvq_moe.config.schema import Config, MoEConfig, OptimizerConfig
from simvq_moe.moe.routers.topk import TopKOptions
from simvq_moe.records.catalogue import usage_leaves
from simvq_moe.records.run_log import RunLog
from simvq_moe.records.usage_metrics import Layer, usage_metrics
from tests.launching import start
from tests.usage_tab.chromium import CHROMIUM, Chromium
from tests.usage_tab.counted import drawn

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
LAYERS = [Layer("experts", 8, 2)] * 6
RATES = (1e-3, 3e-3, 1e-2)
SEEDS = 6
HELD_OUT = {"val/loss", *(f"val/moe/mean/{leaf}" for leaf in usage_leaves("overview"))}
CHARTS = 6
"""In the category that is open."""
TEXT = """
function* texts(node) {
  if (node.nodeType === 3) yield node.data.trim();
  if (node.shadowRoot) yield* texts(node.shadowRoot);
  for (const child of node.childNodes)
    if (!["STYLE", "SCRIPT", "TEMPLATE"].includes(child.nodeName)) yield* texts(child);
}
"""
"""Every text of the page, within its elements' own trees as well."""


def write_run(folder: Path, rate: float, seed: int) -> None:
    run = folder / f"lr{rate:g}" / f"seed{seed}"
    run.mkdir(parents=True)
    config = Config(
        task="language_model",
        name=f"lr{rate:g}/seed{seed}",
        arm=f"lr{rate:g}",
        seed=seed,
        optimizer=OptimizerConfig(lr=rate),
        moe=MoEConfig(router=TopKOptions()),
    )
    log = RunLog(run, LAYERS, 0, steps=40, config=config)
    for step, counts in enumerate(drawn(np.random.default_rng(seed), LAYERS, 4), start=1):
        held_out = {"val/loss": 1 / step, **usage_metrics(LAYERS, counts, prefix="val/")}
        metrics = {"train/loss": 1 / step, **usage_metrics(LAYERS, counts), **held_out}
        log.write(10 * step, metrics, counts, counts)
    log.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of `simvq-moe dashboard` over the sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    for rate in RATES:
        for seed in range(SEEDS):
            write_run(folder / "runs", rate, seed)
    process = start("dashboard", "--port", "0", cwd=folder)
    assert process.stderr is not None
    yield next(line for line in process.stderr if line.startswith("http")).strip()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    found = Chromium(tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


def test_custom_scalars_of_18_runs_ask_for_an_overview_and_draw_it(
    page: Chromium, address: str
) -> None:
    page.open(f"{address}#custom_scalars", width=1280)
    page.read(f"performance.setResourceTimingBufferSize(10000); {TEXT}")
    lines = f"Matches ({2 * len(RATES) * SEEDS})"  # train and val loss
    page.until(f"[...texts(document.body)].includes('{lines}')", seconds=120)
    one = f"Matches ({len(RATES) * SEEDS})"
    drawn = f"[...texts(document.body)].filter((text) => text === '{one}').length"
    page.until(f"{drawn} === {CHARTS - 1}", seconds=120)
    asked = "performance.getEntriesByType('resource').map((one) => one.name)"
    found = [name for name in page.read(asked) if "/custom_scalars/scalars" in name]
    assert len(found) == CHARTS * len(RATES) * SEEDS
    assert page.complaints == []


def test_hparams_have_the_keys_that_differ_and_final_measures(page: Chromium, address: str) -> None:
    page.open("about:blank", width=1280)
    page.open(f"{address}#hparams", width=1280)
    page.read(TEXT)
    page.until("[...texts(document.body)].includes('val/loss')", seconds=120)
    names = page.read("[...texts(document.body)].filter((text) => /[a-z][./][a-z]/.test(text))")
    assert {"optimizer.lr", *HELD_OUT} == set(names)
    assert {"arm", "seed"} <= set(page.read("[...texts(document.body)]"))
