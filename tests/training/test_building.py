"""Every kind of quantizer trains from the config, and options that mean nothing are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from simvq_moe.config import Config
from simvq_moe.config_checks import check
from simvq_moe.merging import ConfigError, with_flags
from simvq_moe.models.image_tokenizer import ImageTokenizer
from simvq_moe.training.building import build_model
from simvq_moe.training.engine import World
from tests.short_training import train_two_steps

KINDS = {
    "vq": (),
    "kmeans": ("--quantizer.kind", "vq", "--quantizer.init", "kmeans"),
    "rotation": ("--quantizer.gradient", "rotation"),
    "diveq": ("--quantizer.gradient", "diveq"),
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
}


def config(*flags: str) -> Config:
    return with_flags(Config(), ["--quantizer.codes", "64", *flags], "train")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_quantizer_trains_two_steps(kind: str, tmp_path: Path, world: World) -> None:
    summary = train_two_steps(config(*KINDS[kind]), tmp_path / "runs", world)
    assert summary["step"] == 2
    used = "val/codes/02/used" if kind == "residual" else "val/codes/used"
    assert 0 < summary[used] <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--quantizer.kind vq --quantizer.bias True", "quantizer.bias True means nothing to"),
        ("--quantizer.restart 0.1", "quantizer.restart 0.1 means nothing to quantizer.kind"),
        ("--quantizer.init kmeans", "quantizer.init 'kmeans' does not go with"),
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
