"""The most bytes that a rank has at once, at the start, in a step or in an evaluation.

A step is at its highest where the forward pass ends, with all that it keeps, or where the backward
pass ends, with all gradients. What DeepSpeed 0.19 holds of them at each stage was counted on one
rank and on two, in float32 and bfloat16: it copies gradients into a bucket, reduces that whole, and
in bfloat16 and over micro-batches adds them up elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from simvq_moe.core.bank import Bank
from simvq_moe.core.dynamics import LARGEST_COPY
from simvq_moe.engine.settings import BUCKET
from simvq_moe.models.language_model import LanguageModel

FLOAT32, FLOAT64 = 4, 8
LARGEST_LIVE = 10**9
"""Parameters that stage 3 leaves whole after they were used (stage3_max_live_parameters)."""


@dataclass(frozen=True)
class Shares:
    """Numbers of parameters of one rank."""

    local: int
    """Parameters that it computes with."""
    owned: int
    """Parameters that it updates."""
    largest: int
    """Parameters of the largest tensor."""
    piece: int = 0
    """Parameters of the largest piece that is built at once."""

    @property
    def bucket(self) -> int:
        """Parameters whose gradients are reduced at once."""
        return min(BUCKET, self.local)


@dataclass(frozen=True)
class Gradients:
    """Bytes of gradients and of what is gathered and reduced, at moments of a step."""

    always: int = 0
    """Bytes that are held between steps as well."""
    forward: int = 0
    """Bytes beside those, in the forward pass of the last micro-batch."""
    first: int = 0
    """Bytes beside those, when the backward pass begins."""
    last: int = 0
    """Bytes beside those, when it ends."""


@dataclass(frozen=True)
class Work:
    """Bytes that passes make of a batch."""

    forward: int
    """Bytes where the forward pass ends: what it keeps, and scores of the head."""
    backward: int
    """Bytes where the backward pass has begun."""
    block: int
    """Bytes of the largest block, while it runs backward."""
    evaluation: int
    """The most bytes at once in an evaluation."""


def gradients(
    stage: int, shares: Shares, ranks: int, *, size: int, grain: int, accumulates: bool
) -> Gradients:
    """What a stage of ZeRO holds.

    Args:
        size: bytes of a number in forward and backward.
        grain: bytes of a number of a gradient that is added up.
        accumulates: a step has several micro-batches.
    """
    local, owned, bucket = (grain * n for n in (shares.local, shares.owned, shares.bucket))
    apart = size < grain  # gradients are added up in another precision than they are made in
    fresh = grain * shares.largest if accumulates else 0
    if stage == 0:
        before = local if accumulates else 0
        return Gradients(0, before, before, local + fresh + (bucket if ranks > 1 else 0))
    if stage == 1:
        before = local + bucket if accumulates else 0
        end = local + bucket + max(owned if apart else 0, fresh)
        return Gradients(0, before, max(before, bucket), end)
    if stage == 2:
        before = owned if accumulates else 0
        reduced = owned * (shares.local - shares.bucket) // shares.local
        end = 2 * bucket + reduced + (owned if apart or accumulates else 0)
        return Gradients(0, before, before + bucket, end)
    whole = size * min(shares.local, LARGEST_LIVE) if ranks > 1 else 0
    return Gradients(owned + bucket, 2 * whole, whole, 2 * bucket)


def peak(states: int, held: Gradients, work: Work) -> int:
    """The most bytes at once.

    Args:
        states: of weights, of the optimizer, and of what records remember.
    """
    moments = (
        held.forward + work.forward,
        held.first + work.backward,
        held.last + work.block,
        work.evaluation,
    )
    return states + held.always + max(moments)


def largest_piece(model: nn.Module) -> int:
    """Parameters of what is built at once: of a language model a block, the embedding or the head,
    of a tokenizer all."""
    pieces: list[nn.Module] = [model]
    if isinstance(model, LanguageModel):
        pieces = [*model.blocks, model.embedding]
        pieces += [] if model.head is None else [model.head]
    return max(sum(p.numel() for p in piece.parameters()) for piece in pieces)


def start_bytes(stage: int, shares: Shares, ranks: int) -> int:
    """Parameters in float32, before the engine has them: at stage 3 on several ranks a rank's share
    and a piece, which is drawn while its room is there."""
    whole = shares.local
    if stage == 3 and ranks > 1:
        whole = min(whole, shares.owned + 2 * shares.piece)
    return FLOAT32 * whole


def record_bytes(model: nn.Module) -> int:
    """What measures of moving banks remember of them: rows, and maps in float64 as they started and
    as they were before a step."""
    found = 0
    for bank in model.modules():
        if not isinstance(bank, Bank):
            continue
        found += FLOAT32 * min(bank.base.numel(), LARGEST_COPY)
        if bank.maps:
            slots = 1 if bank.shared else len(bank.base)
            found += 2 * FLOAT64 * slots * bank.base.shape[-1] * bank.width
    return found


def checkpoint_bytes(model: nn.Module) -> int:
    """What a checkpoint has of tensors: weights and two moments in float32, buffers as they are."""
    state = model.state_dict(keep_vars=True).values()
    return sum(3 * FLOAT32 * t.numel() if t.requires_grad else t.nbytes for t in state)
