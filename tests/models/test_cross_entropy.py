"""Scores that are never whole give the loss and the gradients of those that are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.models import cross_entropy
from simvq_moe.models.cross_entropy import IGNORED, mean_cross_entropy, token_cross_entropy
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.tasks.registry import build_model
from simvq_moe.tasks.sequences import token_sums
from tests.live_memory import peak_bytes

TOKENS, WIDTH, VOCABULARY = 37, 6, 11
ROW = VOCABULARY * torch.float64.itemsize


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, matrix = torch.randn(TOKENS, WIDTH), torch.randn(VOCABULARY, WIDTH)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    return x.to(dtype).requires_grad_(), matrix.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("rows", [1, 5, 36])
@pytest.mark.parametrize("ignored", [0, 9])
def test_pieces_give_the_loss_and_the_gradients_of_whole_scores(rows: int, ignored: int) -> None:
    x, matrix, targets = inputs()
    targets[:ignored] = IGNORED
    plain = F.cross_entropy(x @ matrix.T, targets)
    of_each = F.cross_entropy(x @ matrix.T, targets, reduction="none")
    expected = torch.autograd.grad(3 * plain, (x, matrix))

    found = mean_cross_entropy(x, matrix, targets, largest=rows * ROW)
    assert_close(found, plain)
    assert_close(torch.autograd.grad(3 * found, (x, matrix)), expected)
    with torch.no_grad():
        assert_close(mean_cross_entropy(x, matrix, targets, largest=rows * ROW), plain)
    assert_close(token_cross_entropy(x, matrix, targets, largest=rows * ROW), of_each)


def test_pieces_in_bfloat16_are_as_close_to_the_truth_as_whole_scores() -> None:
    x, matrix, targets = inputs(torch.bfloat16)
    exact = mean_cross_entropy(x.double(), matrix.double(), targets)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(exact, (x, matrix))])
    errors = []
    for rows in (4, TOKENS):
        loss = mean_cross_entropy(x, matrix, targets, largest=rows * VOCABULARY * 4)
        assert loss.dtype == torch.float32
        found = torch.autograd.grad(loss, (x, matrix))
        assert {g.dtype for g in found} == {torch.bfloat16}
        errors.append(float((torch.cat([g.flatten() for g in found]) - expected).norm()))
    # the parts of pieces are rounded before they are added up
    assert errors[0] < 1.5 * errors[1]


def small(flags: str) -> LanguageModel:
    own = (
        "--task language_model --language_model.layers 1 --language_model.heads 2 "
        "--moe.experts 4 --moe.top_k 2 --moe.hidden 16"
    )
    return build_model(with_flags(Config(), [*own.split(), *flags.split()], "train"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_learns_the_same_whatever_is_made_at_once(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--data.vocabulary 260 --data.context 16 --language_model.width 8"
    flags += f" --language_model.tied_head {tied} --moe.z_loss_weight 0.1"
    model = small(flags).double()
    tokens = torch.randint(260, (3, 17))
    found = []
    for largest in (2**25, 7 * 260 * 8):
        monkeypatch.setitem(cross_entropy.LARGEST, "cpu", largest)
        model.zero_grad()
        loss, terms = model(tokens)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((loss, terms, gradients, token_sums(model, tokens)))
    assert_close(*found)
    assert found[0][1]["z_loss"] > 0


def test_a_vocabulary_of_50304_needs_less_than_200_mib() -> None:
    flags = "--data.vocabulary 50304 --data.context 64 --language_model.width 16"
    model = small(flags).to(torch.bfloat16)
    tokens = torch.randint(50304, (8, 65))
    assert peak_bytes(lambda: model(tokens)[0].backward()) < 200 * 2**20
    with torch.no_grad():
        assert peak_bytes(lambda: token_sums(model.eval(), tokens)) < 200 * 2**20


def test_empty_batches_have_no_nats() -> None:
    model = small("--data.vocabulary 260 --data.context 16 --language_model.width 8").eval()
    sums = token_sums(model, torch.zeros((0, 17), dtype=torch.int64))
    assert not any(sums.values())
