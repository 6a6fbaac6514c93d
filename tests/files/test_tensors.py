"""Tensors are written as safetensors writes them, and read one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from simvq_moe.files.regular import BrokenFileError
from simvq_moe.files.tensors import (
    DTYPES,
    Form,
    StoredWeights,
    read_safetensors,
    weights_sha256,
    write_safetensors,
)
from tests.live_memory import peak_bytes

KIB = 2**10


def tensors_of_every_type() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    found = {
        f"{place % 3}.{name}": torch.randint(2, (3, place + 1), generator=random).to(dtype)
        for place, (name, dtype) in enumerate(DTYPES.items())
    }
    number, none = torch.tensor(1.5), torch.empty(0, 4)
    return found | {"number": number, "none": none, "\u00e4": torch.ones(2)}


def test_the_file_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    tensors, notes = tensors_of_every_type(), {"format": 'a "word"\n'}
    for given in (notes, None):
        save_file(tensors, tmp_path / "theirs", given)
        write_safetensors(tmp_path / "ours", tensors, given)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    across = torch.arange(6).view(2, 3).T
    write_safetensors(tmp_path / "ours", {"across": across})
    assert_close(load_file(tmp_path / "ours")["across"], across)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    tensors = tensors_of_every_type()
    write_safetensors(tmp_path / "file", tensors)
    found = read_safetensors(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert_close(dict(found), tensors, rtol=0, atol=0)
    assert found.forms["0.BOOL"] == Form(torch.bool, (3, 1))
    assert found.digest() == weights_sha256(tensors)
    assert "other" not in found
    with pytest.raises(KeyError):
        found["other"]


def test_a_type_that_no_model_has_is_a_broken_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "file")
    with pytest.raises(BrokenFileError, match="holds no tensors that can be read"):
        read_safetensors(tmp_path / "file")


def test_a_file_is_written_and_its_digest_taken_with_one_tensor_at_a_time(tmp_path: Path) -> None:
    forms = {f"{i}": Form(torch.float32, (64, KIB)) for i in range(8)}
    weights = StoredWeights(forms, lambda name: torch.full((64, KIB), float(name)))
    one = 4 * 64 * KIB
    assert peak_bytes(lambda: write_safetensors(tmp_path / "file", weights)) < 1.1 * one
    assert peak_bytes(weights.digest) < 1.1 * one
    assert_close(load_file(tmp_path / "file"), dict(weights), rtol=0, atol=0)
