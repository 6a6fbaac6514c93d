"""Labels of metrics follow from their names."""

from __future__ import annotations

from simvq_moe.records.catalogue import label, number


def test_a_metric_of_a_step_is_labelled_and_printed_like_its_measure() -> None:
    name = "val/moe/mean/saturation_at/150"
    assert label(name) == "router saturation at step 150"
    assert number(name, 0.5) == number("val/moe/mean/saturation_at", 0.5) == "50.0 %"
    assert number("val/moe/03/fluctuation", 0.25) == "25.0 %"
