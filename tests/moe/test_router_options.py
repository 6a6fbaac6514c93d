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
from simvq_moe.config.moe import RouterOptions
from simvq_moe.config.registry import kinds
from simvq_moe.config.schema import Config
from simvq_moe.core.step_state import after_step
from simvq_moe.engine.optimizer import parameter_groups
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.inference.fold import fold_weights
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.moe import MoE
from simvq_moe.runs import checkpoint
from simvq_moe.tasks.registry import build_model, task_of
from tests.short_training import train_two_steps

TINY = (
    *("--task", "language_model", "--data.vocabulary", "300", "--data.context", "32"),
    *("--language_model.width", "16", "--language_model.layers", "2"),
    *("--language_model.heads", "2", "--train.batch_size", "8", "--moe.experts", "8"),
    *("--moe.top_k", "2", "--moe.hidden", "8"),
)
WHITE = "--moe.router.whiten.kind"
ARMS = {
    **{kind: f"--moe.router.kind {kind}" for kind in kinds(RouterOptions)},
    "frozen": "--moe.router.map.train_base False",
    "centred": "--moe.router.centre True",
    "whitened": f"{WHITE} full --moe.balance.kind loss_free --train.accumulation 2",
    "whitened by low rank": (
        f"--moe.router.kind noisy_topk {WHITE} low_rank --moe.router.whiten.rank 4 "
        "--moe.router.map.kind linear --moe.router.map.base_width 3 --train.dtype bf16"
    ),
    "aux": "--moe.balance.kind aux --moe.z_loss_weight 0.001",
    "loss_free": "--moe.balance.kind loss_free --moe.gates sigmoid",
    "quantile": "--moe.balance.kind quantile --train.accumulation 2 --train.dtype bf16",
    "distance, data": (
        "--moe.router.kind distance --moe.router.map.kind linear --moe.router.map.train_base False "
        "--moe.router.init data --moe.balance.kind aux"
    ),
    "distance, codebook alone": (
        "--moe.router.kind distance --moe.router.learns_from codebook "
        "--moe.router.commitment_weight 0 --moe.router.map.kind linear"
    ),
    "selves, data": (
        "--moe.router.kind self_selecting --moe.expert_in_map.kind linear --moe.router.init data "
        "--moe.expert.kind swiglu"
    ),
    "cosine, Q W": (
        "--moe.router.kind cosine --moe.router.map.kind linear --moe.router.map.base_width 3 "
        "--moe.router.projection 6 --moe.balance.kind loss_free --moe.router.centre True"
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
    flags = "--moe.balance.kind loss_free --moe.router.centre True --train.accumulation 2"
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
        # options of other kinds
        ("--moe.router.kind hash --moe.router.map.kind linear", "moe.router.map.kind linear"),
        ("--moe.router.kind hyper --moe.router.map.train_base False", "moe.router.map.train_base"),
        (f"--moe.router.kind distance {WHITE} full", "moe.router.whiten.kind full"),
        ("--moe.router.kind cosine --moe.router.bias True", "moe.router.bias True belongs to"),
        ("--moe.router.whiten.every 2", "belongs to moe.router.whiten.kind 'full', 'diagonal' or"),
        (
            f"{WHITE} full --moe.router.whiten.rank 2",
            "belongs to moe.router.whiten.kind 'low_rank'",
        ),
        ("--moe.router.projection 4", "belongs to moe.router.kind 'cosine', not 'topk': drop it"),
        ("--moe.router.rank 4", "belongs to moe.router.kind 'self_selecting'"),
        ("--moe.router.codebook_weight 2", "belongs to moe.router.kind 'distance'"),
        ("--moe.router.commitment_weight 2", "belongs to moe.router.kind 'distance'"),
        ("--moe.router.learns_from codebook", "belongs to moe.router.kind 'distance'"),
        (
            "--moe.router.kind distance --moe.router.learns_from codebook "
            "--moe.router.codebook_weight 0",
            "moe.router.learns_from 'codebook' with moe.router.codebook_weight 0.0: nothing",
        ),
        ("--moe.router.init data", "belongs to moe.router.kind 'distance' or 'self_selecting'"),
        ("--moe.router.kind hash --moe.router.centre True", "moe.router.centre True belongs to"),
        ("--moe.balance.rate 0.1", "belongs to moe.balance.kind 'loss_free', not 'none': drop it"),
        (
            "--moe.router.kind cosine --moe.router.map.base_width 16",
            "belongs to moe.router.map.kind 'linear', not 'none'",
        ),
        # values
        (f"{WHITE} full --moe.router.whiten.decay 1", "moe.router.whiten.decay 1"),
        (f"{WHITE} full --moe.router.whiten.floor 0", "moe.router.whiten.floor 0"),
        (f"{WHITE} full --moe.router.whiten.exponent nan", "moe.router.whiten.exponent nan"),
        ("--moe.balance.rate -1 --moe.balance.kind loss_free", "moe.balance.rate -1.0 < 0"),
        # what does not go together
        (f"{WHITE} low_rank", "moe.router.whiten.rank 32 >= width 16 of the model: lower it"),
        (f"{WHITE} full --moe.router.centre True", "which centres as well: drop moe.router.centre"),
        (
            "--moe.router.kind distance --moe.router.init data",
            "moe.router.init 'data' sets moe.router.map, whose kind is 'none': use 'linear' or",
        ),
        (
            "--moe.router.kind self_selecting --moe.router.init data",
            "moe.router.init 'data' sets moe.expert_in_map, whose kind is 'none'",
        ),
        ("--moe.router.map.kind separate", "moe.router.map.kind 'separate': a router's rows are"),
        (
            "--moe.expert_in_map.kind linear --moe.expert_in_map.base_width 4",
            "moe.expert_in_map.base_width 4: projections of experts have the width of the model",
        ),
        (
            "--moe.router.kind hash --moe.z_loss_weight 1",
            "moe.z_loss_weight 1.0 means nothing to moe.router.kind 'hash', which has no scores",
        ),
        (
            "--moe.router.kind hash --moe.balance.kind aux",
            "moe.balance.kind 'aux' means nothing to moe.router.kind 'hash'",
        ),
        (
            "--moe.router.kind hash --moe.gates softmax_topk",
            "its gates are equal and sum to 1: set 'topk_softmax'",
        ),
        (
            "--moe.router.kind expert_choice --moe.gates topk_softmax",
            "its gates are the softmax over all experts: set 'softmax_topk'",
        ),
        (f"{ARMS['expert_choice']} --moe.capacity_factor 2", "moe.capacity_factor 2.0 means"),
        (
            f"{ARMS['expert_choice']} --moe.balance.kind loss_free",
            "moe.balance.kind 'loss_free' means nothing to",
        ),
        (
            "--moe.router.kind self_selecting --moe.expert_in_map.kind separate",
            "keys are separate already",
        ),
        ("--moe.balance.kind quantile --moe.top_k 8", "every expert is chosen: lower moe.top_k"),
        (
            "--moe.dispatch deepspeed_capacity --moe.router.kind hash",
            "moe.router.kind hash with moe.dispatch 'deepspeed_capacity'",
        ),
    ],
)
def test_options_that_mean_nothing_together_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(config(flags))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


ONE_OF_EIGHT = "--moe.top_k 1 --moe.experts 8"


@pytest.mark.parametrize("more", ["", "--moe.balance.kind aux", "--moe.balance.kind loss_free"])
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
        check(config(f"{ONE_OF_EIGHT} --moe.router.kind {router} --moe.gates {gates}"))


@pytest.mark.parametrize(
    "flags",
    [
        "--moe.top_k 1 --moe.experts 1 --moe.gates topk_softmax",  # nothing to choose
        # frozen on purpose
        f"{ONE_OF_EIGHT} --moe.gates sigmoid --moe.router.map.train_base False",
        # learns by its own losses
        f"{ONE_OF_EIGHT} --moe.gates sigmoid --moe.router.kind distance",
        f"{ONE_OF_EIGHT} --moe.router.kind hash",
        f"{ONE_OF_EIGHT} --moe.dispatch deepspeed_capacity",
    ],
)
def test_a_router_that_needs_no_gate_to_learn_is_left_alone(flags: str) -> None:
    check(config(flags))


def test_gates_that_are_spelled_out_are_those_of_the_layer() -> None:
    for flags in ("", ONE_OF_EIGHT, "--moe.router.kind hash --moe.top_k 1"):
        made = with_gates(config(flags))
        layer = next(m for m in build_model(config(flags)).modules() if isinstance(m, MoE))
        assert layer.router.gates == made.moe.gates != "default"


@pytest.mark.parametrize("kind", [kind for kind in kinds(RouterOptions) if kind != "hash"])
def test_the_factor_of_routers_covers_all_of_them_but_their_maps(kind: str) -> None:
    mapped = {"hyper": "", "self_selecting": "--moe.expert_in_map.kind linear"}
    flags = f"{ARMS[kind]} {mapped.get(kind, '--moe.router.map.kind linear')}"
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
