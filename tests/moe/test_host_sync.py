"""A forward and backward pass never makes a GPU wait for the host, or the host for it."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.tasks.registry import build_model

SMALL = (
    *("--task", "language_model", "--data.vocabulary", "260", "--data.context", "16"),
    *("--language_model.width", "32", "--language_model.layers", "3", "--moe.experts", "8"),
    *("--moe.top_k", "2", "--moe.hidden", "16"),
)
ARMS = [
    "",
    "--train.activation_checkpointing True",
    "--moe.router.map.kind linear --moe.expert_out_map.kind linear --moe.expert.kind swiglu",
    "--moe.balance.kind loss_free",
    "--moe.balance.kind quantile",
    "--moe.router.kind cosine",
    "--moe.router.kind noisy_topk",
    "--moe.balance.kind aux --moe.z_loss_weight 0.1 --moe.gates sigmoid --moe.shared_experts 1",
    "--data.document_mask True",
]


def model_of(arm: str, device: str) -> LanguageModel:
    model = build_model(with_flags(Config(), [*SMALL, *arm.split()], "train"))
    for p in model.parameters():
        p.data = p.data.bfloat16()
    return model.to(device)


class Copies(TorchDispatchMode):
    """Notes what meets tensors of the host and of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {a.device.type for a in (*args, out) if isinstance(a, Tensor)}
        if devices == {"cpu", "meta"}:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("arm", ARMS)
def test_a_step_copies_nothing_from_the_host(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "meta" stands in for a GPU, which would wait for all work before such a copy; what reads a
    value of it fails there."""
    autocast = torch.autocast
    none = contextlib.nullcontext()
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **k: none if kind == "meta" else autocast(kind, *a, **k)
    )
    model = model_of(arm, "meta")
    with Copies() as copies:
        model(torch.zeros(4, 17, dtype=torch.long, device="meta"))[0].backward()
    assert not copies.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("arm", ARMS)
def test_a_step_on_a_gpu_waits_for_nothing(arm: str) -> None:
    model = model_of(arm, "cuda")
    tokens = torch.randint(260, (4, 17)).pin_memory()
    model(tokens.cuda())[0].backward()  # loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(tokens.to("cuda", non_blocking=True))[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
