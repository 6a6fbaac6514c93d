"""What a run says of itself."""

from __future__ import annotations

from dataclasses import replace

from simvq_moe.config.checks_moe import with_gates
from simvq_moe.config.loading import with_overrides
from simvq_moe.config.schema import Config, TrainConfig
from simvq_moe.training.meta import differing, doubts


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


def test_gates_are_named_where_they_are_not_those_that_are_taken_unasked() -> None:
    changes = {"task": "language_model", "moe": {"top_k": 1, "experts": 8}}
    unasked = with_gates(with_overrides(Config(), changes, "test"))
    assert unasked.moe.gates == "softmax_topk"
    assert "gates" not in differing(unasked)
    asked = replace(unasked, moe=replace(unasked.moe, top_k=2))
    assert "moe.gates: softmax_topk" in differing(asked)


def test_a_warmup_longer_than_the_run_is_told() -> None:
    short = Config(train=TrainConfig(steps=49))
    assert doubts(short) == [
        "train.steps 49 end before optimizer.warmup_steps 50 do, so the learning rate stays below "
        "optimizer.lr 0.001"
    ]
    assert doubts(replace(short, train=TrainConfig(steps=50))) == []
