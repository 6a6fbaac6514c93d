"""Costs: against PyTorch's own count of what ran, and counts of parameters by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from simvq_moe.cli import main
from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.costs.flops import flops_per_token, parameter_counts
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.tasks.registry import build_model

SMALL = (
    *("--task", "language_model", "--data.vocabulary", "260", "--data.context", "8"),
    *("--language_model.width", "16", "--language_model.layers", "2", "--moe.experts", "6"),
    *("--moe.top_k", "2", "--moe.hidden", "4", "--train.batch_size", "3"),
)
W, M = "--moe.router.whiten", "--moe.router.map"
LOW_RANK = f"{W}.kind low_rank {W}.rank 3 {W}.every 1"
MAPS = "--moe.expert_out_map.kind linear --moe.expert_in_map.kind low_rank"
SEPARATE = "--moe.expert_out_map.kind separate"
ARMS = {
    "plain": "",
    "dense": "--language_model.moe_every 0",
    "every second": "--language_model.moe_every 2 --language_model.tied_head False",
    "swiglu": "--moe.expert.kind swiglu --moe.shared_experts 1",
    "shared maps": f"{MAPS} --moe.expert_in_map.rank 3",
    "router map": f"{M}.kind linear {M}.base_width 5 {M}.train_base False",
    "separate maps": "--moe.expert_out_map.kind separate --moe.expert_in_map.kind separate",
    "frozen": "--moe.expert_out_map.train_base False --moe.expert_in_map.train_base False",
    "separate, frozen": f"{SEPARATE} --moe.expert_out_map.train_base False",
    "noisy": "--moe.router.kind noisy_topk",
    "whitened": f"{W}.kind full {W}.every 1 {M}.kind linear",
    "whitened, frozen": f"{LOW_RANK} --moe.router.map.train_base False",
    "whitened, hyper": "--moe.router.kind hyper --moe.router.whiten.kind diagonal",
    "whitened, noisy": f"{LOW_RANK} --moe.router.kind noisy_topk",
    "cosine": "--moe.router.kind cosine --moe.router.map.kind linear --moe.router.map.base_width 5",
    "cosine, frozen": f"--moe.router.kind cosine {M}.kind linear {M}.train_base False",
    "distance": "--moe.router.kind distance --moe.router.map.kind linear",
    "self-selecting": "--moe.router.kind self_selecting --moe.expert_in_map.kind linear",
    "self-selecting swiglu": "--moe.router.kind self_selecting --moe.expert.kind swiglu",
    "hash": "--moe.router.kind hash",
}


def model(arm: str) -> LanguageModel:
    found = build_model(with_flags(Config(), [*SMALL, *arm.split()], "train"))
    assert isinstance(found, LanguageModel)
    return found


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_the_flops_of_a_token_are_those_that_ran(arm: str) -> None:
    # float64, for the count knows no fused product of groups, nor fused attention on the CPU
    lm = model(arm).double()
    window = torch.randint(260, (3, 9))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        lm(window)[0].backward()
    # rounded to whole operations of a token
    assert flops_per_token(lm, 3 * 8) * 3 * 8 == pytest.approx(counter.get_total_flops(), rel=1e-4)


def test_a_dense_block_costs_as_much_as_a_mixture_without_its_router() -> None:
    for kind in ("gelu", "swiglu"):
        options = f"--moe.expert.kind {kind} --moe.shared_experts 1"
        moe, dense = model(options), model(f"{options} --language_model.moe_every 0")
        router = 2 * 6 * 16
        active = parameter_counts(moe)["active"]
        assert active - router == sum(parameter_counts(dense).values()) / 2
        assert flops_per_token(moe, 24) - 6 * router == flops_per_token(dense, 24)


@pytest.mark.parametrize(
    ("arm", "of_an_expert", "in_every_layer"),
    [
        ("", 2 * 4 * 16, 6 * 16),
        ("--moe.expert.kind swiglu --moe.shared_experts 3", 3 * 4 * 16, 6 * 16 + 9 * 4 * 16),
        ("--moe.expert_out_map.kind separate", 2 * 4 * 16 + 16 * 16, 6 * 16),
        (
            f"{SEPARATE} --moe.expert_out_map.train_base False",
            4 * 16 + 256,
            6 * 16,
        ),
        ("--moe.expert_out_map.kind linear", 2 * 4 * 16, 6 * 16 + 256),
        ("--moe.dispatch deepspeed_capacity", 2 * 4 * 16, 6 * 16),
        ("--language_model.tied_head False", 2 * 4 * 16, 6 * 16 + 260 * 16 // 2),
    ],
)
def test_a_token_meets_everything_but_the_experts_that_it_was_not_sent_to(
    arm: str, of_an_expert: int, in_every_layer: int
) -> None:
    rest = 260 * 16 + 16 + 2 * (2 * 16 + 4 * 16 * 16 + in_every_layer)
    counted = parameter_counts(model(arm))
    assert counted == {"total": rest + 12 * of_an_expert, "active": rest + 4 * of_an_expert}


def test_a_dry_run_prints_what_the_model_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", *SMALL]) == 0
    printed = json.loads(capsys.readouterr().out)
    lm = model("")
    assert printed["flops_per_token"] == flops_per_token(lm, 24)
    assert printed["parameters"] == parameter_counts(lm)
