"""Whole models built on the meta device, given room and filled are what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simvq_moe import EMAVQ, FSQ, SimVQ
from simvq_moe.config.moe import MoEConfig
from simvq_moe.models.audio.discriminators import Discriminators
from simvq_moe.models.audio.tokenizer import AudioTokenizer
from simvq_moe.models.image.discriminator import PatchDiscriminator
from simvq_moe.models.image.tokenizer import ImageTokenizer
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.moe.balances.aux import AuxBalance
from simvq_moe.moe.balances.quantile import QuantileBalance


def language_model(**options: Any) -> LanguageModel:
    own = {"hidden": 4, "experts": 4, "top_k": 2, "balance": AuxBalance(weight=0.01)}
    moe = MoEConfig(**own | options)
    shape = {"width": 16, "layers": 2, "heads": 2, "document_mask": True}
    return LanguageModel(17, 8, **shape, moe=moe)


def audio_tokenizer() -> AudioTokenizer:
    return AudioTokenizer(
        SimVQ(8, 4),
        sample_rate=8000,
        hidden=4,
        strides=(2, 4),
        dilations=(1,),
        loss_windows=(32, 64),
        loss_weights={"waveform": 1.0, "mel": 1.0, "adversarial": 1.0, "feature": 1.0},
        discriminators=Discriminators((2,), (32,), 4),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "language model": (language_model, lambda: torch.randint(17, (2, 9))),
    "quantile": (
        lambda: language_model(balance=QuantileBalance()),
        lambda: torch.randint(17, (2, 9)),
    ),
    "image tokenizer": (
        lambda: ImageTokenizer(FSQ([4, 2]), hidden=4),
        lambda: torch.randn(2, 3, 16, 16),
    ),
    "vqgan": (
        lambda: ImageTokenizer(
            EMAVQ(8, 4),
            architecture="vqgan",
            hidden=8,
            attention=True,
            discriminator=PatchDiscriminator(4, 1, "hinge"),
        ),
        lambda: torch.randn(2, 3, 16, 16),
    ),
    "audio tokenizer": (audio_tokenizer, lambda: torch.randn(2, 256)),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_built_on_the_meta_device_and_filled_it_is_what_it_was(name: str, assign: bool) -> None:
    build, sample = MODELS[name]
    torch.manual_seed(0)
    whole, batch = build().eval(), sample()
    with torch.device("meta"):
        empty = build()
    if not assign:
        empty = empty.to_empty(device="cpu")
        for tensor in (*empty.buffers(), *empty.parameters()):
            tensor.detach().fill_(7)
    empty.load_state_dict(whole.state_dict(), assign=assign)
    losses = [model.eval()(batch)[0] for model in (empty, whole)]
    assert torch.equal(*losses)
    with torch.inference_mode():
        assert torch.equal(empty(batch)[0], losses[1])
