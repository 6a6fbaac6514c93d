"""Optimizer groups and schedule."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config, OptimizerConfig
from simvq_moe.engine.optimizer import learning_rate_factor, parameter_groups
from simvq_moe.engine.world import World
from simvq_moe.tasks.registry import build_model

MAPPED = (
    *("--task", "language_model", "--moe.router.map.kind", "linear"),
    *("--moe.expert_out_map.kind", "linear"),
    *("--optimizer.map_lr_multiplier", "5", "--optimizer.router_lr_multiplier", "0.1"),
    *("--optimizer.weight_decay", "0.1", "--optimizer.lr", "0.01"),
)


def test_every_parameter_is_in_one_group_with_the_rate_of_its_role() -> None:
    config = with_flags(Config(), MAPPED, "train")
    model = build_model(config)
    groups = {group["name"]: group for group in parameter_groups(model, config.optimizer)}
    members = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    by_role = {role: {names[id(p)] for p in g["params"]} for role, g in groups.items()}
    assert all(name.endswith(".W") for name in by_role["map"])
    assert len(by_role["map"]) == 2 * config.language_model.layers
    assert all(name.endswith("router.bank.base") for name in by_role["router"])
    assert all("norm" in name for name in by_role["vector"])
    rates = {role: (group["lr"], group["weight_decay"]) for role, group in groups.items()}
    assert rates["matrix"] == (0.01, 0.1)
    assert rates["vector"] == (0.01, 0.0)
    assert rates["map"] == (0.05, 0.0)
    assert rates["router"] == (0.001, 0.1)


def test_the_factor_of_routers_reaches_that_of_deepspeeds_own_layer(world: World) -> None:
    assert world.size == 1
    flags = ("--moe.dispatch", "deepspeed_capacity", "--task", "language_model")
    factor = ("--optimizer.router_lr_multiplier", "0.1", "--optimizer.lr", "0.01")
    config = with_flags(Config(), [*flags, *factor], "train")
    model = build_model(config)
    groups = {group["name"]: group for group in parameter_groups(model, config.optimizer)}
    assert groups["router"]["lr"] == pytest.approx(0.001)
    rows = {id(p) for name, p in model.named_parameters() if name.endswith("gate.wg.weight")}
    assert {id(p) for p in groups["router"]["params"]} == rows
    assert len(rows) == config.language_model.layers


def test_the_rate_warms_up_linearly_and_falls_along_a_cosine_to_its_floor() -> None:
    optimizer = OptimizerConfig(warmup_steps=10, final_lr_ratio=0.1)
    factors = [learning_rate_factor(step, 111, optimizer) for step in range(111)]
    assert_close(torch.tensor(factors[:10]), torch.arange(1, 11) / 10)
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55)
    assert factors[110] == pytest.approx(0.1)
    constant = OptimizerConfig(warmup_steps=0, final_lr_ratio=1.0)
    assert {learning_rate_factor(step, 5, constant) for step in range(5)} == {1.0}
