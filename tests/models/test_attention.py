"""Attention against that of `transformers`, and what rotary positions promise."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, MixtralRotaryEmbedding

from simvq_moe.models.attention import ROTARY_BASE, Attention
from simvq_moe.models.document_attention import documents_of


@pytest.mark.parametrize("documents", [False, True])
def test_outputs_and_gradients_are_those_of_mixtral(documents: bool) -> None:
    torch.manual_seed(0)
    width, heads, tokens = 32, 4, 10
    ours = Attention(width, heads, tokens).double()
    config = MixtralConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rope_parameters={"rope_theta": ROTARY_BASE, "rope_type": "default"},
    )
    config._attn_implementation = "eager"
    theirs = MixtralAttention(config, layer_idx=0).double()
    projections = (theirs.q_proj, theirs.k_proj, theirs.v_proj)
    with torch.no_grad():
        for projection, weight in zip(projections, ours.qkv.weight.chunk(3), strict=True):
            projection.weight.copy_(weight)
        theirs.o_proj.weight.copy_(ours.out.weight)
    place = torch.arange(tokens).expand(2, -1)
    mask = (place[:, :, None] >= place[:, None]).clone()
    if documents:  # the second window has two, of 4 and of 6 tokens
        place = place.clone()
        place[1, 4:] -= 4
        mask[1, 4:, :4] = False
    x = torch.randn(2, tokens, width, dtype=torch.float64)
    minus_infinity = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, -torch.inf)
    cos, sin = MixtralRotaryEmbedding(config)(x, place)
    expected, _ = theirs(x, (cos, sin), minus_infinity[:, None])
    ends = torch.zeros(2, tokens, dtype=torch.long)
    ends[1, 3] = 1
    inside = documents_of(ends, torch.tensor(1), width // heads) if documents else None
    got = ours(x, inside)
    # the angles of both are float32 tables
    assert_close(got, expected, rtol=1e-5, atol=1e-6)
    along = torch.randn_like(got)
    wanted = torch.autograd.grad((expected * along).sum(), [p.weight for p in projections])
    (gradient,) = torch.autograd.grad((got * along).sum(), ours.qkv.weight)
    assert_close(gradient, torch.cat(wanted), rtol=1e-5, atol=1e-5)


def test_rotary_attention_sees_distances_not_positions() -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2, 20).double()
    q, k = torch.randn(2, 8, dtype=torch.float64)
    turned = [attention._turn(v.expand(1, 20, 1, 8), None)[0, :, 0] for v in (q, k)]
    scores = turned[0] @ turned[1].mT
    for distance in range(3):
        diagonal = scores.diagonal(-distance)
        # the angles are a float32 table
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-6)
    assert_close(turned[0].norm(dim=-1), q.norm().expand(20), rtol=1e-5, atol=1e-6)
