"""Every metric is described once, and what shows metrics follows from that."""

from __future__ import annotations

from pathlib import Path

import pytest

from simvq_moe.core.dynamics import BankStep
from simvq_moe.core.usage import Usage
from simvq_moe.engine.step_phases import PHASES
from simvq_moe.models.image.tokenizer import TERMS
from simvq_moe.records import catalogue
from simvq_moe.records.catalogue import (
    METRICS,
    WHOLE,
    compared_leaves,
    describe,
    directed,
    find,
    held_out_names,
    label,
    metric,
    names,
    results,
    router_leaves,
    usage_leaves,
)
from simvq_moe.records.metric import PARTS, Metric
from simvq_moe.records.metrics_page import page
from simvq_moe.records.printing import number
from simvq_moe.records.tensorboard_layout import AT_A_GLANCE, layout
from simvq_moe.records.usage_metrics import Layer
from simvq_moe.reports.watch import COLUMNS
from tests.launching import ROOT

RECORDED = (Path(__file__).parent / "recorded_names.txt").read_text().split()
"""Names in metrics.jsonl and summary.json of runs of every task, router, balance and map."""


def test_a_metric_of_a_step_is_labelled_and_printed_like_its_measure() -> None:
    name = "val/moe/mean/saturation_at/150"
    assert label(name) == "router saturation at step 150"
    assert number(name, 0.5) == number("val/moe/mean/saturation_at", 0.5) == "50.0 %"
    assert number("val/moe/03/fluctuation", 0.25) == "25.0 %"


@pytest.mark.parametrize("name", RECORDED)
def test_what_runs_have_logged_is_in_the_catalogue(name: str) -> None:
    assert find(name) is not None


def test_every_entry_of_a_measure_is_logged_and_every_measure_has_an_entry() -> None:
    where = (*WHOLE, "moe/00", "codes/11", "moe_kept/00", "moe_kept/mean")
    for place in where:
        for leaf in Usage.__dataclass_fields__:
            assert find(f"{place}/{leaf}") is find(f"val/codes/{leaf}") is not None
    for leaf in BankStep.__dataclass_fields__:
        assert find(f"bank/00/{leaf}") is find(f"bank/experts.down/{leaf}") is not None
    assert all(find(f"time/{phase}") for phase in PHASES)
    for term in TERMS:
        assert find(f"train/{term}") or find(f"train/{term}_loss")


def test_a_name_has_one_entry_and_an_entry_is_a_whole_sentence() -> None:
    for name in RECORDED:
        assert sum(one.pattern.fullmatch(name) is not None for one in METRICS) == 1, name
    for one in METRICS:
        assert one.meaning[0].isupper() or one.meaning[0].isdigit(), one.name
        assert one.meaning.endswith("."), one.name
        left = one.name
        for part in PARTS:
            left = left.replace(part, "")
        assert not set("{}[]") & set(left), one.name


def test_a_metric_of_a_plug_in_is_one_of_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "METRICS", [*METRICS])
    mine = Metric("val/reach", "reach", "Largest error.", "m", better="lower", charts=("overview",))
    assert find("val/reach") is None
    for _ in range(2):
        describe(mine)
    assert find("val/reach") is mine
    assert directed("val/reach") == "reach ↓"
    assert "val/reach" in held_out_names()
    assert results().count("val/reach") == 1
    with pytest.raises(ValueError, match=r"'val/mse' is '.*' already: name it otherwise"):
        describe(Metric("val/mse", "mine", "Mine."))
    find.cache_clear()


def test_a_name_that_nobody_described_is_shown_as_it_is() -> None:
    assert find("val/own/measure_of_mine") is None
    assert label("val/own/measure_of_mine") == "measure of mine"
    assert label("train/my_loss") == "training my loss"
    assert number("train/my_loss", 0.123456) == "0.1235"
    assert metric("codes/02/used_by_me").better is None


def test_charts_follow_from_the_entries() -> None:
    assert compared_leaves() == ["entropy", "used", "max_vio"]
    assert set(usage_leaves("overview")) <= set(usage_leaves("table"))
    assert {f"moe/mean/{leaf}" for leaf in usage_leaves("overview")} <= AT_A_GLANCE
    charts = layout([Layer("experts", 4, 2)] * 2)
    assert list(charts["detail: routers on the probe, each layer"]) == router_leaves("detail")
    assert list(charts["detail: usage over layers"]) == usage_leaves("detail")
    assert names("outcome") == ["val/mse", "val/bits_per_byte", "val/loss"]
    assert {"val/mse", "val/codes/used", "val/moe/mean/entropy"} <= set(results())
    assert {"loss", "used", "MaxVio", "tokens/s"} <= set(COLUMNS)


def test_the_page_in_docs_is_the_catalogue() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == page()
    assert all(f"`{part}`" in page() for part in PARTS)
