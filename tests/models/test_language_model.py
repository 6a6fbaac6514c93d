"""The language model: causal, paired over arms, and with the losses it says."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from simvq_moe.models.language_model import Attention, LanguageModel


def model(**moe: Any) -> LanguageModel:
    torch.manual_seed(0)
    settings = {"experts": 6, "top_k": 2, "hidden": 8} | moe
    return LanguageModel(
        50, 12, width=16, layers=2, heads=2, moe=settings, loss_weights={"balance": 0.5}
    )


def test_a_later_token_changes_no_earlier_score() -> None:
    lm = model()
    tokens = torch.randint(50, (3, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    before, after = lm.logits(tokens)[0], lm.logits(changed)[0]
    assert_close(after[:, :7], before[:, :7])
    assert not torch.equal(after[:, 7:], before[:, 7:])


def test_the_loss_is_the_cross_entropy_of_the_next_token_plus_the_weighted_balance() -> None:
    lm = model()
    window = torch.randint(50, (3, 13))
    loss, terms = lm(window)
    logits, losses = lm.logits(window[:, :-1])
    nats = [-F.log_softmax(logits[b, t], -1)[window[b, t + 1]] for b in range(3) for t in range(12)]
    assert_close(terms["cross_entropy"], torch.stack(nats).mean())
    assert_close(loss, terms["cross_entropy"] + 0.5 * losses["balance"])


def test_rotary_attention_sees_distances_not_positions() -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2, 20).double()
    q, k = torch.randn(2, 8, dtype=torch.float64)
    turned = [attention._turn(v.expand(1, 1, 20, 8)) for v in (q, k)]
    scores = (turned[0] @ turned[1].mT)[0, 0]
    for distance in range(3):
        diagonal = scores.diagonal(-distance)
        # the angles are a float32 table
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-6)
    assert_close(turned[0].norm(dim=-1), q.norm().expand(1, 1, 20), rtol=1e-5, atol=1e-6)


def test_arms_start_from_the_same_weights_and_the_same_first_loss() -> None:
    window = torch.randint(50, (3, 13))
    base = model()
    for moe in ({"expert_out_map": "linear"}, {"router_map": "linear"}):
        assert_close(model(**moe)(window), base(window), rtol=0, atol=0)
    narrow = model(router_map="linear", router_base_width=4)
    for name, weight in base.state_dict().items():
        if "router" not in name:
            assert_close(narrow.state_dict()[name], weight, rtol=0, atol=0)
