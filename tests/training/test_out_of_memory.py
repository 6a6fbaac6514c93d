"""A run that asks for more memory than there is ends in one line, and what it saved stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from simvq_moe.engine.agreement import is_out_of_memory
from tests.launching import run_forked

HUNGRY = '''
from dataclasses import dataclass
from typing import Literal

import torch

from simvq_moe.config.registry import register
from simvq_moe.quantizers import VQ, CodebookOptions


class HungryVQ(VQ):
    batches = 0

    def prepare(self, z):
        self.batches += self.training
        return z if self.batches < 7 else torch.empty(2**60)


@register
@dataclass(frozen=True)
class HungryVQOptions(CodebookOptions):
    """Asks for more memory than there is when the seventh batch comes."""

    kind: Literal["hungry_vq"] = "hungry_vq"

    def level(self):
        return HungryVQ(self.codes, self.width)
'''


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.empty(2**60, dtype=torch.uint8),
        lambda: np.zeros(2**60, dtype=np.uint8),
        lambda: bytearray(2**60),
    ],
    ids=["torch", "numpy", "python"],
)
def test_whoever_asks_for_too_much_is_understood(ask: Callable[[], object]):
    with pytest.raises(Exception) as caught:  # noqa: PT011  each library has its own
        ask()
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("sizes do not match"))


def test_a_run_without_memory_says_what_to_lower_and_where_it_was_saved(tmp_path: Path):
    (tmp_path / "hungry.py").write_text(HUNGRY)
    (tmp_path / "c.yaml").write_text(
        "plugins: [hungry.py]\nquantizer: {kind: hungry_vq, codes: 8}\n"
    )
    flags = ("--data.crops", "16", "--data.held_out_crops", "9", "--train.batch_size", "4")
    steps = ("--train.steps", "12", "--train.save_every", "2", "--image_tokenizer.hidden", "4")
    command = ("train", "--config", "c.yaml", "--name", "hungry", *flags, *steps)
    done = run_forked(*command, cwd=tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("runs/hungry: rank 0: cpu is out of memory (newest checkpoint: step ")
    assert "train.batch_size 4" in last
    assert "Traceback" not in done.stderr
    meta = json.loads((tmp_path / "runs/hungry/meta.json").read_text())
    assert meta["status"] == "failed"
    assert "out of memory" in meta["error"]
