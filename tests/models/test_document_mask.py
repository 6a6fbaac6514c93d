"""A document in a packed window is what it is alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from simvq_moe.config.moe import MoEConfig
from simvq_moe.models.language_model import LanguageModel

END = 3


def model(mask: bool = True, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    lm = LanguageModel(
        *(50, 12),
        width=16,
        layers=2,
        heads=2,
        moe=MoEConfig(experts=6, top_k=2, hidden=8),
        document_mask=mask,
        **options,
    )
    if lm.end_of_text is not None:
        lm.end_of_text.fill_(END)
    return lm.double().eval()


def test_scores_of_packed_documents_are_those_of_each_alone() -> None:
    lm = model()
    parts = [[7, 8, 9, END], [END], [10, 11, END], [12, 13, 14, 15]]
    packed = lm.logits(torch.tensor([[*itertools.chain(*parts)]]))[0][0]
    alone = [lm.logits(torch.tensor([part]))[0][0] for part in parts]
    assert_close(packed, torch.cat(alone))


def test_without_the_mask_documents_before_change_the_scores() -> None:
    lm = model(mask=False)
    assert "end_of_text" not in lm.state_dict()
    alone = lm.logits(torch.tensor([[10, 11]]))[0][0]
    packed = lm.logits(torch.tensor([[7, 8, END, 10, 11]]))[0][0, 3:]
    assert not torch.allclose(alone, packed)


def test_a_window_of_one_document_scores_as_without_the_mask() -> None:
    tokens = torch.tensor([[7, 8, 9, 10, 11, 12]])
    assert_close(model().logits(tokens)[0], model(mask=False).logits(tokens)[0])


def test_every_token_is_a_target_also_the_first_of_a_document() -> None:
    lm = model()
    window = torch.tensor([[7, END, 9, 10, END, 12, 13]])
    _, terms = lm(window)
    logits = lm.logits(window[:, :-1])[0]
    assert_close(terms["cross_entropy"], F.cross_entropy(logits[0], window[0, 1:]))


@pytest.mark.parametrize("again", [False, True])
def test_gradients_of_a_document_know_nothing_of_the_one_before(again: bool) -> None:
    lm = model(activation_checkpointing=again).train()
    tokens = torch.tensor([[7, 8, END, 10, 11, 12]])
    lm.embedding.weight.requires_grad_()
    lm.logits(tokens)[0][0, 3:].square().sum().backward()
    gradient = lm.embedding.weight.grad
    assert gradient is not None
    # the tied head reads every row for every token, so compare with the scores' own part
    alone = model(activation_checkpointing=again).train()
    alone.logits(torch.tensor([[10, 11, 12]]))[0][0].square().sum().backward()
    assert_close(gradient, alone.embedding.weight.grad)


def test_generation_continues_the_last_document_alone() -> None:
    lm = model()
    long = lm.generate(torch.tensor([[7, 8, END, 10, 11]]), 4, temperature=0.0)[0, 5:]
    short = lm.generate(torch.tensor([[10, 11]]), 4, temperature=0.0)[0, 2:]
    assert long.tolist() == short.tolist()
