"""Every kind of quantizer trains from the config, and options that mean nothing are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from simvq_moe import EMAVQ, FSQ, LFQ, VQ, SimVQ
from simvq_moe.config.checks import check
from simvq_moe.config.flags import with_flags
from simvq_moe.config.loading import with_overrides
from simvq_moe.config.quantizer import QuantizerOptions
from simvq_moe.config.registry import kinds
from simvq_moe.config.schema import Config
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.models.image.tokenizer import ImageTokenizer
from simvq_moe.quantizers import BSQ, IBQ, MLPVQ, NSVQ, CosineVQ, GroupVQ, Quantizer, RunningMapVQ
from simvq_moe.tasks.registry import build_model
from tests.short_training import train_two_steps

KINDS = {
    "vq": (),
    "kmeans": ("--quantizer.kind", "vq", "--quantizer.init", "kmeans"),
    "rotation": ("--quantizer.gradient", "rotation"),
    "diveq": ("--quantizer.gradient", "diveq"),
    "noise": ("--quantizer.gradient", "noise_substitution"),
    "ns_vq": ("--quantizer.kind", "ns_vq"),
    "running_map": ("--quantizer.kind", "running_map"),
    "restart": ("--quantizer.kind", "ema", "--quantizer.restart", "0.1"),
    "data": ("--quantizer.init", "data"),
    "narrow": ("--quantizer.base_width", "4", "--quantizer.bias", "True"),
    "both": ("--quantizer.train_base", "True"),
    "diagonal": ("--quantizer.transform", "diagonal"),
    "cosine_vq": ("--quantizer.kind", "cosine_vq", "--quantizer.width", "8"),
    "group_vq": ("--quantizer.kind", "group_vq", "--quantizer.groups", "4"),
    "mlp_vq": ("--quantizer.kind", "mlp_vq"),
    "ibq": ("--quantizer.kind", "ibq"),
    "fsq": (
        *("--quantizer.kind", "fsq", "--quantizer.levels", "4", "4", "4"),
        *("--quantizer.width", "3"),
    ),
    "lfq": ("--quantizer.kind", "lfq", "--quantizer.width", "6"),
    "bsq": ("--quantizer.kind", "bsq", "--quantizer.width", "6"),
    "residual": ("--quantizer.residual_levels", "3"),
    "level_dropout": ("--quantizer.residual_levels", "3", "--quantizer.level_dropout", "0.5"),
}


def config(*flags: str) -> Config:
    return with_flags(Config(), ["--quantizer.codes", "64", *flags], "train")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_quantizer_trains_two_steps(kind: str, tmp_path: Path, world: World) -> None:
    summary = train_two_steps(config(*KINDS[kind]), tmp_path / "runs", world)
    assert summary["step"] == 2
    used = "val/codes/02/used" if kind in ("residual", "level_dropout") else "val/codes/used"
    assert 0 < summary[used] <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--quantizer.kind vq --quantizer.bias True",
            "quantizer.bias True belongs to quantizer.kind 'simvq', not",
        ),
        ("--quantizer.restart 0.1", "quantizer.restart 0.1 belongs to quantizer.kind"),
        ("--quantizer.init kmeans", "--quantizer.init"),
        ("--quantizer.kind lfq", "quantizer.codes 64 must be 2^quantizer.width = 4294967296"),
        ("--quantizer.kind fsq --quantizer.levels 8 8", "need quantizer.width 2 and"),
        ("--quantizer.kind group_vq", "quantizer.groups None must divide quantizer.codes 64"),
    ],
)
def test_options_that_mean_nothing_or_do_not_fit_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(config(*flags.split()))
    assert message in str(error.value)


def test_arms_share_the_start_of_encoder_and_decoder_whatever_their_codebook() -> None:
    models = [build_model(config(*flags)) for flags in (KINDS["both"], KINDS["lfq"])]
    first, second = (m for m in models if isinstance(m, ImageTokenizer))
    for part in ("encoder", "decoder"):
        weights = (getattr(m, part).state_dict() for m in (first, second))
        assert_close(*weights, rtol=0, atol=0)


def test_vq_and_simvq_start_from_the_same_codebook() -> None:
    vq, simvq = (build_model(config("--quantizer.kind", kind)) for kind in ("vq", "simvq"))
    assert isinstance(vq, ImageTokenizer)
    assert isinstance(simvq, ImageTokenizer)
    ids = torch.arange(64)
    assert_close(vq.quantizer.decode(ids), simvq.quantizer.decode(ids), rtol=0, atol=0)


BY_CLASS = {
    "vq": VQ(16, 4),
    "ema": EMAVQ(16, 4),
    "running_map": RunningMapVQ(16, 4),
    "ns_vq": NSVQ(16, 4),
    "simvq": SimVQ(16, 4),
    "cosine_vq": CosineVQ(16, 4),
    "group_vq": GroupVQ(16, 4, groups=2),
    "mlp_vq": MLPVQ(16, 4),
    "fsq": FSQ([2, 2, 2, 2]),
    "lfq": LFQ(4),
    "bsq": BSQ(4),
    "ibq": IBQ(16, 4),
}
EXTRA = {"fsq": {"levels": (2, 2, 2, 2)}, "group_vq": {"groups": 2}}
WEIGHTS = {
    "codebook_weight": ("vq", "ns_vq", "simvq", "cosine_vq", "group_vq", "mlp_vq", "ibq"),
    "commitment_weight": tuple(kind for kind in BY_CLASS if kind != "fsq"),
    "entropy_weight": ("lfq", "bsq", "ibq"),
}


def of_kind_named(kind: str, **options: Any) -> QuantizerOptions:
    """Options as a config gives them."""
    given = {"kind": kind, "codes": 16, "width": 4, **EXTRA.get(kind, {}), **options}
    return with_overrides(Config(), {"quantizer": given}, "here").quantizer


def test_every_kind_is_compared_with_its_class() -> None:
    assert set(BY_CLASS) == set(kinds(QuantizerOptions))


@pytest.mark.parametrize("kind", list(BY_CLASS))
def test_a_quantizer_by_config_is_that_of_its_class(kind: str) -> None:
    made, own = of_kind_named(kind).build(), BY_CLASS[kind]
    assert isinstance(made, Quantizer)
    assert type(made) is type(own)
    assert used_weights(made) == used_weights(own)
    plain = {
        "training",
        "gradient",
        "decay",
        "epsilon",
        "restart",
        "temperature",
        "halving",
        "codes",
        "width",
    }
    for name in plain & vars(own).keys():
        assert getattr(made, name) == getattr(own, name), name


@pytest.mark.parametrize("kind", ["lfq", "bsq", "ibq"])
def test_softness_and_diversity_of_entropies_reach_their_kinds(kind: str) -> None:
    given = {"temperature": 0.5, "diversity_weight": 3.0, "entropy_weight": 0.2}
    made = of_kind_named(kind, **given).build()
    assert isinstance(made, LFQ | IBQ)
    assert made.temperature == 0.5
    assert made.weights["token_entropy"] == 0.2
    assert made.weights["codebook_entropy"] == pytest.approx(-0.6)


@pytest.mark.parametrize("option", list(WEIGHTS))
@pytest.mark.parametrize("kind", list(BY_CLASS))
def test_a_weight_reaches_its_kind_and_others_refuse_it_by_name(kind: str, option: str) -> None:
    if kind not in WEIGHTS[option]:
        with pytest.raises(ConfigError, match=rf"{option} 0\.7 belongs to quantizer\.kind"):
            of_kind_named(kind, **{option: 0.7})
        return
    options = of_kind_named(kind, **{option: 0.7})
    check(Config(quantizer=options))
    made = options.build()
    assert isinstance(made, Quantizer)
    assert 0.7 in made.weights.values()


def used_weights(quantizer: Quantizer) -> dict[str, float]:
    """Those of terms that its loss has."""
    losses = copy.deepcopy(quantizer)(torch.randn(5, 4)).losses
    return {name: weight for name, weight in quantizer.weights.items() if name in losses}
