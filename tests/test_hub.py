"""Files that claim to be a saved module are that module, or one line; nothing large is made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from simvq_moe import FSQ, VQ, SimVQ
from simvq_moe.files.regular import BrokenFileError
from simvq_moe.hub import CONFIG, WEIGHTS, Pretrained


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
