"""What a run says of itself."""

from __future__ import annotations

from dataclasses import replace

from simvq_moe.config.loading import with_overrides
from simvq_moe.config.schema import Config
from simvq_moe.training.meta import differing


def test_a_run_prints_what_differs_from_the_defaults_and_of_its_own_task() -> None:
    changes = {"data": {"crops": 64}, "quantizer": {"kind": "vq"}, "moe": {"experts": 8}}
    config = with_overrides(Config(name="mine"), changes, "test")
    assert differing(config).splitlines() == [
        "runs/mine/config.yaml, where not as by default:",
        "name: mine",
        "data.crops: 64",
        "quantizer.kind: vq",
    ]
    language = replace(config, task="language_model")
    assert "moe.experts: 8" in differing(language)
    assert "quantizer" not in differing(language)
