"""Files that claim to be a saved module are that module, or one line; nothing large is made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from simvq_moe import FSQ, VQ, MoE, SimVQ
from simvq_moe.config.moe import MoEConfig
from simvq_moe.files.regular import BrokenFileError
from simvq_moe.hub import CARD, CONFIG, WEIGHTS, Pretrained
from simvq_moe.models.audio.discriminators import Discriminators
from simvq_moe.models.audio.tokenizer import AudioTokenizer
from simvq_moe.models.image.discriminator import PatchDiscriminator
from simvq_moe.models.image.tokenizer import ImageTokenizer
from simvq_moe.models.language_model import LanguageModel


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    SimVQ(8, 4).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, **arguments: Any) -> None:
    spec = json.loads((folder / CONFIG).read_text())
    spec["arguments"] |= arguments
    (folder / CONFIG).write_text(json.dumps(spec))


@pytest.mark.parametrize(
    "arguments",
    [
        {"codes": 10**12},
        {"codes": -1},
        {"codes": "many"},
        {"width": 4.5},
        {"width": {"class": "VQ"}},
        {"unknown": 1},
        {"gradient": "none"},
        {"codes": [8]},
        {"codes": {"class": ["VQ"], "arguments": {}}},
        {"codes": 9},
    ],
)
def test_arguments_that_are_not_those_of_the_weights_are_refused(
    saved: Path, arguments: dict[str, Any]
) -> None:
    rewrite(saved, **arguments)
    with pytest.raises(ValueError, match=r"config\.json"):
        Pretrained.from_pretrained(saved)


@pytest.mark.parametrize(
    "content",
    [b"", b"[" * 100_000, b"\xff\xfe", b"nonsense", b'{"class": "VQ"}', b'{"class": "os.system"}'],
)
def test_configs_that_are_none_are_refused(saved: Path, content: bytes) -> None:
    (saved / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        Pretrained.from_pretrained(saved)
    for plain in (b"7", b"[]", b"{}", b"null"):
        (saved / CONFIG).write_bytes(plain)
        with pytest.raises(ValueError, match="holds a"):
            SimVQ.from_pretrained(saved)


def test_weights_that_are_none_are_refused(saved: Path) -> None:
    for content in (b"", b"<html>not found</html>", (saved / WEIGHTS).read_bytes()[:-1]):
        (saved / WEIGHTS).write_bytes(content)
        with pytest.raises(BrokenFileError, match=r"model\.safetensors holds no tensors"):
            SimVQ.from_pretrained(saved)
    save_file({}, saved / WEIGHTS)
    with pytest.raises(BrokenFileError, match="lacks tensors"):
        SimVQ.from_pretrained(saved)
    save_file({"other": torch.ones(64)}, saved / WEIGHTS)
    with pytest.raises(BrokenFileError, match="other of shape"):
        SimVQ.from_pretrained(saved)
    (saved / WEIGHTS).unlink()
    os.mkfifo(saved / WEIGHTS)
    with pytest.raises(BrokenFileError, match="no regular file"):
        SimVQ.from_pretrained(saved)


def test_modules_of_every_kind_come_back(tmp_path: Path) -> None:
    for module in (VQ(4, 2), SimVQ(4, 2, bias=True), FSQ([4, 3])):
        module.save_pretrained(tmp_path)
        again = type(module).from_pretrained(tmp_path)
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], tensor)


def image_tokenizer() -> ImageTokenizer:
    judge = PatchDiscriminator(4, 1, "hinge")
    return ImageTokenizer(SimVQ(16, 4), hidden=4, discriminator=judge, adaptive=True)


def audio_tokenizer() -> AudioTokenizer:
    return AudioTokenizer(
        SimVQ(16, 4),
        sample_rate=8_000,
        loss_windows=(32, 64),
        loss_weights={"waveform": 1.0, "spectral": 1.0},
        hidden=2,
        strides=(2, 4),
        dilations=(1,),
        discriminators=Discriminators((2,), (32,), 2),
    )


def language_model() -> LanguageModel:
    moe = MoEConfig(experts=4, top_k=2, hidden=4, shared_experts=1)
    return LanguageModel(32, 8, width=8, layers=2, heads=2, moe=moe, document_mask=True)


MODELS = {
    "image": (image_tokenizer, lambda model: model.decode(model.encode(torch.zeros(1, 3, 8, 8)))),
    "audio": (audio_tokenizer, lambda model: model.decode(model.encode(torch.zeros(1, 64)))),
    "text": (language_model, lambda model: model.logits(torch.arange(8)[None])[0]),
    "moe": (lambda: MoE(8, 4, 4, 2), lambda model: model(torch.ones(2, 8))),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_come_back_in_evaluation_mode_and_compute_the_same(
    name: str, tmp_path: Path
) -> None:
    make, use = MODELS[name]
    model = make().eval()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(use(again), use(model), rtol=0, atol=0)


def test_a_quantizer_that_was_folded_in_a_model_is_saved_as_what_it_is(tmp_path: Path) -> None:
    model = image_tokenizer()
    assert isinstance(model.quantizer, SimVQ)
    model.quantizer = model.quantizer.fold()
    model.save_pretrained(tmp_path)
    assert type(ImageTokenizer.from_pretrained(tmp_path).quantizer) is VQ


def test_more_layers_than_tensors_are_refused_before_they_are_made(tmp_path: Path) -> None:
    language_model().save_pretrained(tmp_path)
    rewrite(tmp_path, layers=10**12)
    with pytest.raises(BrokenFileError, match=r"config\.json has layers 1000000000000 for"):
        LanguageModel.from_pretrained(tmp_path)


def test_a_repository_gets_the_files_of_a_folder_and_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub itself is not there: what is asked of it is."""
    from huggingface_hub import HfApi

    asked: list[dict[str, Any]] = []

    def uploaded(_: HfApi, *, folder_path: str, **named: Any) -> str:
        asked.append(named | {path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
        return "https://hub/commit"

    monkeypatch.setattr(HfApi, "upload_folder", uploaded)
    made = type("Repository", (), {"repo_id": "me/codes"})
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: made)
    assert SimVQ(8, 4).push_to_hub("codes", branch="tried") == "https://hub/commit"
    (files,) = asked
    assert (files["repo_id"], files["revision"]) == ("me/codes", "tried")
    assert b"SimVQ.from_pretrained" in files[CARD]
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes(files[name])
    assert len(SimVQ.from_pretrained(tmp_path).codebook()) == 8


def test_a_card_of_ones_own_stays(tmp_path: Path) -> None:
    SimVQ(8, 4).save_pretrained(tmp_path)
    (tmp_path / CARD).write_text("mine")
    SimVQ(8, 4).save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "mine"
    SimVQ(8, 4).save_pretrained(tmp_path, card={CARD: "another"})
    assert (tmp_path / CARD).read_text() == "another"
