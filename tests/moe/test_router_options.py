"""Routers and balance methods from the config: they train, fold, and refuse what means nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from simvq_moe.config.checks import check
from simvq_moe.config.checks_moe import with_gates
from simvq_moe.config.flags import with_flags
from simvq_moe.config.loading import ConfigError
from simvq_moe.config.schema import Config
from simvq_moe.engine.optimizer import parameter_groups
from simvq_moe.engine.world import World
from simvq_moe.inference.fold import fold_weights
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.moe import MoE
from simvq_moe.moe.running_mean import after_step
from simvq_moe.runs import checkpoint
from simvq_moe.tasks.models import build_model
from simvq_moe.tasks.registry import task_of
from tests.moe.test_routers import KINDS
from tests.short_training import train_two_steps

TINY = (
    *("--task", "language_model", "--data.vocabulary", "300", "--data.context", "32"),
    *("--language_model.width", "16", "--language_model.layers", "2"),
    *("--language_model.heads", "2", "--train.batch_size", "8", "--moe.experts", "8"),
    *("--moe.top_k", "2", "--moe.hidden", "8"),
)
ARMS = {
    **{kind: f"--moe.router {kind}" for kind in KINDS},
    "expert_choice": "--moe.router expert_choice --moe.gates softmax_topk",
    "frozen": "--moe.train_router_base False",
    "centred": "--moe.centre_router_input True",
    "whitened": "--moe.whiten_router_input full --moe.balance loss_free --train.accumulation 2",
    "whitened by low rank": (
        "--moe.whiten_router_input low_rank --moe.whitening_rank 4 --moe.router noisy_topk "
        "--moe.router_map linear --moe.router_base_width 3 --train.dtype bf16"
    ),
    "aux": "--moe.balance aux --moe.z_loss_weight 0.001",
    "loss_free": "--moe.balance loss_free --moe.gates sigmoid",
    "quantile": "--moe.balance quantile --train.accumulation 2 --train.dtype bf16",
    "distance, data": (
        "--moe.router distance --moe.router_map linear --moe.train_router_base False "
        "--moe.router_init data --moe.balance aux"
    ),
    "selves, data": (
        "--moe.router self_selecting --moe.expert_in_map linear --moe.router_init data "
        "--moe.expert swiglu"
    ),
    "cosine, Q W": (
        "--moe.router cosine --moe.router_map linear --moe.router_base_width 3 "
        "--moe.router_projection 6 --moe.balance loss_free --moe.centre_router_input True"
    ),
}


def config(flags: str, *more: str) -> Config:
    return with_flags(Config(), [*TINY, *flags.split(), *more], "train")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real text: this test suite."""
    folder = tmp_path_factory.mktemp("text") / "corpus"
    folder.mkdir()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        (folder / file.name).write_text(file.read_text())
    return folder


@pytest.mark.parametrize("arm", ARMS)
def test_every_router_and_balance_trains_two_steps(arm: str, corpus: Path, world: World) -> None:
    made = config(ARMS[arm], "--data.source", str(corpus), "--name", re.sub(r"\W+", "_", arm))
    summary = train_two_steps(made, corpus.parent / "runs", world)
    assert summary["step"] == 2
    assert 0 < summary["val/moe/mean/used"] <= 1


def test_training_moves_biases_and_means_once_a_step(corpus: Path, world: World) -> None:
    flags = "--moe.balance loss_free --moe.centre_router_input True --train.accumulation 2"
    made = config(flags, "--data.source", str(corpus), "--name", "steps")
    train_two_steps(made, corpus.parent / "runs", world)
    state = checkpoint.load_weights(corpus.parent / "runs" / "steps" / "checkpoints" / "2")
    for layer in range(2):
        part = f"blocks.{layer}.moe.router"
        assert int(state[f"{part}.centre.steps"]) == 2
        assert float(state[f"{part}.centre.mean"].abs().max()) > 0
        biases = state[f"{part}.selection.bias"]
        assert 0.001 <= float(biases.abs().max()) <= 0.0021


@pytest.mark.parametrize(
    "arm",
    ["selves, data", "distance, data", "cosine, Q W", "whitened", "whitened by low rank"],
)
def test_a_model_with_folded_weights_computes_the_same(arm: str) -> None:
    made = config(ARMS[arm])
    model = build_model(made).double()
    folded = build_model(task_of(made).without_maps(made)).double()
    assert isinstance(model, LanguageModel)
    assert isinstance(folded, LanguageModel)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
        model.logits(torch.randint(300, (4, 20)))
        after_step(model)
    folded.load_state_dict(fold_weights(model))
    tokens = torch.randint(300, (2, 20))
    assert_close(folded.eval().logits(tokens)[0], model.eval().logits(tokens)[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--moe.router hash --moe.router_map linear", "router_map linear means nothing to"),
        ("--moe.router hyper --moe.train_router_base False", "train_router_base False means"),
        (
            "--moe.router distance --moe.whiten_router_input full",
            "moe.whiten_router_input full means",
        ),
        ("--moe.router cosine --moe.router_bias True", "moe.router_bias True means nothing to"),
        ("--moe.whitening_every 2", "moe.whitening_every 2 with moe.whiten_router_input 'none'"),
        (
            "--moe.whiten_router_input full --moe.whitening_rank 2",
            "moe.whitening_rank 2 with moe.whiten_router_input 'full': drop it, or use 'low_rank'",
        ),
        ("--moe.whiten_router_input low_rank", "moe.whitening_rank 32 >= language_model.width 16"),
        ("--moe.whiten_router_input full --moe.centre_router_input True", "centres as well"),
        ("--moe.whiten_router_input full --moe.whitening_decay 1", "moe.whitening_decay 1"),
        ("--moe.whiten_router_input full --moe.whitening_floor 0", "moe.whitening_floor 0"),
        ("--moe.whiten_router_input full --moe.whitening_exponent nan", "whitening_exponent nan"),
        ("--moe.router_projection 4", "moe.router_projection 4 means nothing to moe.router 'topk'"),
        ("--moe.self_selecting_rank 4", "drop it, or use router self_selecting"),
        ("--moe.router_codebook_weight 2", "drop it, or use router distance"),
        ("--moe.router_commitment_weight 2", "drop it, or use router distance"),
        ("--moe.router_init data", "drop it, or use router distance or self_selecting"),
        ("--moe.router distance --moe.router_init data", "sets moe.router_map, which is 'none'"),
        ("--moe.router self_selecting --moe.router_init data", "sets moe.expert_in_map"),
        ("--moe.router hash --moe.centre_router_input True", "moe.centre_router_input True means"),
        ("--moe.router hash --moe.z_loss_weight 1", "moe.z_loss_weight 1.0 means nothing to"),
        ("--moe.router hash --moe.balance aux", "moe.balance aux means nothing to moe.router 'h"),
        ("--moe.router hash --moe.gates softmax_topk", "its gates are equal and sum to 1: set"),
        ("--moe.router expert_choice", "its gates are the softmax over all experts: set"),
        (f"{ARMS['expert_choice']} --moe.capacity_factor 2", "moe.capacity_factor 2.0 means"),
        (f"{ARMS['expert_choice']} --moe.balance loss_free", "moe.balance loss_free means"),
        ("--moe.router self_selecting --moe.expert_in_map separate", "keys are separate already"),
        ("--moe.balance quantile --moe.top_k 8", "every expert is chosen: lower moe.top_k"),
        ("--moe.bias_update_rate 0.1", "drop it, or use moe.balance 'loss_free'"),
        ("--moe.bias_update_rate -1 --moe.balance loss_free", "moe.bias_update_rate -1.0 < 0"),
        ("--moe.router cosine --moe.router_base_width 16", "moe.router_base_width 16 with"),
        ("--moe.dispatch deepspeed_capacity --moe.router hash", "moe.router hash with"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(config(flags))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


ONE_OF_EIGHT = "--moe.top_k 1 --moe.experts 8"


@pytest.mark.parametrize("more", ["", "--moe.balance aux", "--moe.balance loss_free"])
def test_one_chosen_expert_has_a_gate_that_teaches_the_router(more: str) -> None:
    made = config(f"{ONE_OF_EIGHT} {more}")
    check(made)
    model = build_model(made)
    assert isinstance(model, LanguageModel)
    loss, terms = model(torch.randint(300, (2, 20)))
    del loss
    terms["cross_entropy"].backward()
    for name, p in model.named_parameters():
        if name.endswith("router.bank.base"):
            assert p.grad is not None
            assert p.grad.abs().max() > 1e-9


@pytest.mark.parametrize("gates", ["topk_softmax", "sigmoid"])
@pytest.mark.parametrize("router", ["topk", "noisy_topk", "cosine", "hyper"])
def test_a_constant_gate_is_refused_by_name(router: str, gates: str) -> None:
    with pytest.raises(ConfigError, match=rf"moe.gates '{gates}' with moe.top_k 1: .*softmax_topk"):
        check(config(f"{ONE_OF_EIGHT} --moe.router {router} --moe.gates {gates}"))


@pytest.mark.parametrize(
    "flags",
    [
        "--moe.top_k 1 --moe.experts 1 --moe.gates topk_softmax",  # nothing to choose
        f"{ONE_OF_EIGHT} --moe.gates sigmoid --moe.train_router_base False",  # frozen on purpose
        f"{ONE_OF_EIGHT} --moe.gates sigmoid --moe.router distance",  # learns by its own losses
        f"{ONE_OF_EIGHT} --moe.router hash",
        f"{ONE_OF_EIGHT} --moe.dispatch deepspeed_capacity",
    ],
)
def test_a_router_that_needs_no_gate_to_learn_is_left_alone(flags: str) -> None:
    check(config(flags))


def test_gates_that_are_spelled_out_are_those_of_the_layer() -> None:
    for flags in ("", ONE_OF_EIGHT, "--moe.router hash --moe.top_k 1"):
        made = with_gates(config(flags))
        layer = next(m for m in build_model(config(flags)).modules() if isinstance(m, MoE))
        assert layer.router.gates == made.moe.gates != "default"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hash"])
def test_the_factor_of_routers_covers_all_of_them_but_their_maps(kind: str) -> None:
    mapped = {"hyper": "", "self_selecting": "--moe.expert_in_map linear"}
    flags = f"{ARMS[kind]} {mapped.get(kind, '--moe.router_map linear')}"
    factors = "--optimizer.lr 1 --optimizer.router_lr_multiplier 0.1 --optimizer.weight_decay 0.1"
    made = config(f"{flags} {factors} --optimizer.map_lr_multiplier 5")
    model = build_model(made)
    settings = {
        id(p): (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, made.optimizer)
        for p in group["params"]
    }
    for name, p in model.named_parameters():
        if ".router." in name and name.endswith(".W"):
            assert settings[id(p)] == (5.0, 0.0)
        elif ".router." in name:
            assert settings[id(p)] == (0.1, 0.1 if p.ndim > 1 else 0.0)
