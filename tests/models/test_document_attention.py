"""Attention inside documents is that under the mask of every query with every key, and keeps no
such mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters as dynamo_counters
from torch.testing import assert_close

from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.costs.activations import kept_bytes
from simvq_moe.models import language_model
from simvq_moe.models.attention import causal_attention
from simvq_moe.models.document_attention import (
    Attend,
    Documents,
    InBlocks,
    InBuckets,
    InMask,
    documents_of,
    row_length,
)
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.tasks.registry import build_model
from tests.live_memory import peak_bytes
from tests.models.tracing import of_tracing, untyped

assert untyped  # a fixture

END = 3


def windows(batch: int, tokens: int, lengths: int) -> Tensor:
    """Documents of so many tokens at most."""
    made = torch.full((batch, tokens), 7)
    for row in made:
        ends = torch.randint(1, lengths + 1, (tokens,)).cumsum(0) - 1
        row[ends[ends < tokens]] = END
    return made


def numbers_of(tokens: Tensor) -> Tensor:
    """Of the document of every token."""
    ends = (tokens == END).long()
    return ends.cumsum(1) - ends


def by_mask(tokens: Tensor, *_: object) -> Documents:
    return documents_of(tokens, torch.tensor(END), 8)._replace(attend=InMask(numbers_of(tokens)))


def test_masks_and_positions_by_hand() -> None:
    tokens = torch.tensor([[7, END, 9, 9, END, END, 1]])
    number = [0, 0, 1, 1, 1, 2, 3]
    assert numbers_of(tokens)[0].tolist() == number
    expected = [[j <= i and number[i] == number[j] for j in range(7)] for i in range(7)]
    assert InMask(numbers_of(tokens)).mask[0].tolist() == expected
    documents = documents_of(tokens, torch.tensor(END), 8)
    assert documents.positions[0].tolist() == [0, 1, 0, 1, 2, 0, 0]
    q = torch.zeros(1, 7, 1, 7, dtype=torch.float64)
    # equal scores: what is seen is the mean of the values, which say whose they are
    seen = documents.attend(q, q, torch.eye(7, dtype=torch.float64)[None, :, None])[0, :, 0]
    assert (seen > 0).tolist() == expected


@pytest.mark.parametrize("lengths", [1, 3, 20, 90, 1000])
def test_in_float64_it_is_attention_under_the_mask(lengths: int) -> None:
    torch.manual_seed(lengths)
    tokens = windows(3, 150, lengths)
    qkv = torch.randn(3, 3, 150, 2, 8, dtype=torch.float64, requires_grad=True)
    along = torch.randn(3, 150, 2, 8, dtype=torch.float64)
    found = []
    for attend in (documents_of(tokens, torch.tensor(END), 8).attend, by_mask(tokens).attend):
        y = attend(*qkv)
        found.append((y, *torch.autograd.grad((y * along).sum(), qkv)))
    assert_close(*found)


def test_one_document_is_causal_attention_and_no_window_is_none() -> None:
    qkv = torch.randn(3, 2, 12, 2, 8, dtype=torch.float64)
    whole = InBuckets(torch.arange(12).expand(2, -1))
    assert_close(whole(*qkv), causal_attention(*qkv))
    assert InBuckets(torch.zeros(0, 12, dtype=torch.long))(*qkv[:, :0]).shape == (0, 12, 2, 8)


def test_blocks_of_flex_attention_see_what_the_mask_shows() -> None:
    """Forward alone: FlexAttention goes backward on GPUs only."""
    torch.manual_seed(0)
    tokens = windows(2, 300, 90)
    qkv = torch.randn(3, 2, 300, 2, 16, dtype=torch.float64)
    eager: dict[str, Callable[..., Tensor]] = {}
    from torch.nn.attention import flex_attention

    for name in ("flex_attention", "create_block_mask"):
        eager[name] = getattr(flex_attention, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simvq_moe.models.document_attention._flex", eager.__getitem__)
        patch.setattr(flex_attention, "_WARNINGS_SHOWN", {"flex_attention_performance"})
        with torch.no_grad():
            assert_close(InBlocks(numbers_of(tokens))(*qkv), by_mask(tokens).attend(*qkv))


def test_rows_are_few_and_a_quarter_longer_at_most() -> None:
    lengths = torch.arange(1, 4097)
    rows = row_length(lengths)
    assert (rows >= lengths).all()
    assert (4 * rows <= 5 * lengths).all()
    assert len(rows.unique()) <= 4 * 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_blocks_are_the_mask_forward_and_backward_and_wait_for_nothing() -> None:
    tokens = windows(2, 300, 90).cuda()
    end = torch.tensor(END).cuda()
    qkv = torch.randn(3, 2, 300, 2, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def gradient(attend: Attend) -> tuple[Tensor, Tensor]:
        y = attend(*qkv)
        return y, torch.autograd.grad(y.float().square().sum(), qkv)[0]

    assert isinstance(documents_of(tokens, end, 16).attend, InBlocks)
    expected = gradient(InMask(numbers_of(tokens)))
    gradient(documents_of(tokens, end, 16).attend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = gradient(documents_of(tokens, end, 16).attend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # bfloat16 has 8 bits
    assert_close(got, expected, rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("untyped")
@of_tracing
def test_a_compiled_model_is_the_same_and_nothing_is_compiled_anew_for_other_documents() -> None:
    compiled, eager = (model(32, True, torch.float32) for _ in range(2))
    compiled.compile_blocks(backend="aot_eager")
    for lengths in (5, 30):
        tokens = windows(2, 33, lengths)
        for lm in (compiled, eager):
            lm.zero_grad()
            lm(tokens)[0].backward()
        assert_close([p.grad for p in compiled.parameters()], [p.grad for p in eager.parameters()])
    # before and after the attention itself
    assert dynamo_counters["stats"]["unique_graphs"] == 2


def model(context: int, masked: bool, dtype: torch.dtype) -> LanguageModel:
    flags = "--task language_model --data.vocabulary 260 --language_model.width 32 \
        --language_model.layers 2 --moe.experts 8 --moe.top_k 2 --moe.hidden 8"
    chosen = f"--data.context {context} --data.document_mask {masked}"
    torch.manual_seed(0)
    made = build_model(with_flags(Config(), f"{flags} {chosen}".split(), "train"))
    assert isinstance(made, LanguageModel)
    if made.end_of_text is not None:
        made.end_of_text.fill_(END)
    return made.to(dtype)


@pytest.mark.parametrize("again", [False, True])
def test_loss_and_gradients_of_a_model_are_those_under_the_mask(
    again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, found = windows(3, 65, 30), []
    for documents in (documents_of, by_mask):
        monkeypatch.setattr(language_model, "documents_of", documents)
        lm = model(64, True, torch.float64)
        lm.activation_checkpointing = again
        loss, _ = lm(tokens)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in lm.parameters())])
    assert_close(*found)


@pytest.mark.parametrize("lengths", [5, 100, 2000])
@pytest.mark.parametrize("context", [128, 512])
def test_a_masked_pass_needs_a_tenth_more_memory_at_most(context: int, lengths: int) -> None:
    tokens = windows(4, context + 1, lengths)
    kept, peaks = [], []
    for masked in (True, False):
        lm = model(context, masked, torch.bfloat16)
        kept.append(kept_bytes(lm, tokens)[0])
        peaks.append(peak_bytes(lambda lm=lm: lm(tokens)[0].backward()))
    assert kept[0] <= 1.1 * kept[1]
    assert peaks[0] <= 1.1 * peaks[1]
