"""Foreign weights in and out, and an exported program: the same ids everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from simvq_moe import VQ, SimVQ
from simvq_moe.quantizers.interchange import simvq_from, state_for
from tests.shape_checks import without_shape_checks

peer: Any = pytest.importorskip("vector_quantize_pytorch")


def official_layers() -> nn.ModuleDict:
    """The two layers of the authors' quantizer, by their names."""
    return nn.ModuleDict({"embedding": nn.Embedding(20, 4), "embedding_proj": nn.Linear(4, 4)})


def test_the_authors_weights_give_their_codes_and_come_back() -> None:
    torch.manual_seed(0)
    layers = official_layers()
    ours = simvq_from(layers.state_dict())
    theirs = layers["embedding_proj"](layers["embedding"].weight)
    assert_close(ours.codebook(), theirs)
    z = torch.randn(50, 4)
    assert torch.equal(ours.encode(z), torch.cdist(z, theirs).argmin(1))
    assert_close(state_for(ours, "official"), dict(layers.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("base_width", [4, 7])
def test_vector_quantize_pytorch_weights_give_the_same_ids_both_ways(base_width: int) -> None:
    torch.manual_seed(0)
    theirs = peer.SimVQ(dim=4, codebook_size=20, frozen_codebook_dim=base_width)
    ours = simvq_from(theirs.state_dict(), gradient="rotation")
    z = torch.randn(1, 50, 4)
    assert torch.equal(ours.encode(z), theirs(z)[1])
    fresh = peer.SimVQ(dim=4, codebook_size=20, frozen_codebook_dim=base_width)
    fresh.load_state_dict(state_for(ours, "vector_quantize_pytorch"))
    assert torch.equal(fresh(z)[1], theirs(z)[1])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"state dict with \['weight'\]"):
        simvq_from(nn.Linear(2, 2, bias=False).state_dict())
    with pytest.raises(ValueError, match="transform 'diagonal' has no linear layer"):
        state_for(SimVQ(4, 2, transform="diagonal"), "official")


class _Encode(nn.Module):
    def __init__(self, quantizer: SimVQ | VQ) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.quantizer.encode(z)


class _Decode(_Encode):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.quantizer.decode(z)


@pytest.mark.parametrize("folded", [False, True])
def test_encode_and_decode_export_to_plain_operators(folded: bool) -> None:
    torch.manual_seed(0)
    quantizer = SimVQ(20, 4, bias=True).eval()
    kept = quantizer.fold().eval() if folded else quantizer
    z, tokens = torch.randn(3, 7, 4), torch.export.Dim("tokens", min=2)
    with without_shape_checks():
        encode = torch.export.export(_Encode(kept), (z,), dynamic_shapes=({1: tokens},))
        decode = torch.export.export(_Decode(kept), (kept.encode(z),))
    other = torch.randn(3, 11, 4)
    assert torch.equal(encode.module()(other), quantizer.encode(other))
    assert_close(decode.module()(quantizer.encode(z)), quantizer(z).z_q)
    for program in (encode, decode):
        assert "simvq_moe" not in str(program.graph)
