"""What every quantizer shares: the layout of latents, masks and precision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from simvq_moe.core.bank import wide
from simvq_moe.core.collectives import share_of_tokens, total
from simvq_moe.core.ids import as_ids
from simvq_moe.core.state import Stateful
from simvq_moe.hub import Pretrained

PADDING = -1
"""Id of a masked token; it decodes to zeros."""


class Quantized(NamedTuple):
    """What a quantizer returns."""

    z_q: Tensor
    """Quantized latents, shape and dtype of z; their value is the code, their gradient z's."""
    ids: Tensor
    """int64 ids of the codes, the leading shape of z (and one more axis if there are several)."""
    loss: Tensor
    """Weighted sum of `losses`."""
    losses: dict[str, Tensor]
    """Each term by name, unweighted: mean squared error over elements."""


class AnyQuantizer(Pretrained, Stateful, ABC):
    """Layout, masks and precision of every quantizer; a family works on (tokens, width) rows.

    Everything is computed in float32 at least, also under autocast, and in float64 if z is. Masked
    tokens never reach the rows: they enter no loss, no statistic and no count.

    A family gives `quantize`, `assign` and `lookup` on rows, and `fit` if it starts from data.

    Args:
        width: channels of a latent.
        channels_first: latents are (batch, width, ...) instead of (..., width).
    """

    id_axes: int = 0
    """Axes of ids behind the tokens: 1 if a token has several ids."""

    def __init__(self, width: int, *, channels_first: bool = False) -> None:
        super().__init__()
        self.width = width
        self.channels_first = channels_first

    @property
    def waits_for_data(self) -> bool:
        """True until `initialize` has seen data, for a quantizer that starts from data."""
        return False

    @property
    def summed_numbers(self) -> int:
        """Numbers that ranks add up for it in a training step, beside gradients and single ones."""
        return 0

    @property
    def summed_bytes(self) -> int:
        """Bytes of these numbers."""
        return 4 * self.summed_numbers

    @property
    def summing_calls(self) -> int:
        """Collective calls in which they are added up: of a step, or where nothing of it waits for
        the end of the step, of a micro-batch."""
        return 0

    @abstractmethod
    def quantize(self, z: Float[Tensor, "tokens width"]) -> Quantized:
        """Codes, ids and losses of packed rows."""

    @abstractmethod
    def assign(self, z: Float[Tensor, "tokens width"]) -> Int[Tensor, "tokens ..."]:
        """Ids of packed rows, without a gradient."""

    @abstractmethod
    def lookup(self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None) -> Tensor:
        """The codes named by ids, all valid, computed in `dtype` (None: as stored)."""

    def fit(self, z: Float[Tensor, "tokens width"]) -> None:
        """Start from packed rows, of all ranks together."""

    def join(self, levels: Sequence[AnyQuantizer], place: int) -> None:
        """Become one of several residual levels, whose place is counted from 0.

        Raises:
            ValueError: it can't refine what the levels before it left over.
        """

    def target(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        """What residual levels approximate together, if this is the first of them."""
        return z

    def forward(
        self, z: Float[Tensor, "*latents"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> Quantized:
        """Quantize latents; where `mask` is False the output is 0 and the id is `PADDING`.

        Losses are means over this rank's latents. With a mask, ranks differ in how many they have:
        in training the losses are then weighted by this rank's share, so that gradients averaged
        over ranks are those of one rank on the joined batch, and losses averaged over ranks its
        losses. A loss of z_q needs the same: divide its sum by the mean number of valid latents.
        That takes a collective, so pass a mask on every rank, even if all or nothing is valid, or
        on none.
        """
        rows = self._rows(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            if self.training and self.waits_for_data:
                self._fit(rows)
            out = self.quantize(rows)
            if self.training and mask is not None:
                out = _weighted(out, share_of_tokens(len(rows), out.loss))
        z_q = self._unpacked(out.z_q.to(z.dtype), z, mask, fill=0)
        ids = self._unpacked(out.ids, z, mask, fill=PADDING)
        return out._replace(z_q=z_q.movedim(-1, 1) if self.channels_first else z_q, ids=ids)

    @torch.no_grad()
    def encode(
        self, z: Float[Tensor, "*latents"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> Int[Tensor, "*ids"]:
        """Ids of the nearest codes; ties go to the lowest id."""
        rows = self._rows(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            return self._unpacked(self.assign(rows), z, mask, fill=PADDING)

    def decode(
        self, ids: Integer[Tensor, "*ids"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*latents"]:
        """The codes named by ids in `dtype` (None: as stored), equal to the forward value of `z_q`.

        Like it they are computed in float32 at least, and rounded once.

        Args:
            ids: of any integer dtype; those below 0 are padding, or levels that a token skipped.

        Raises:
            ValueError: ids are no integers: True and False would be read as a mask.
        """
        ids = as_ids(ids)
        with torch.autocast(ids.device.type, enabled=False):
            e = self.lookup_padded(ids, wide(dtype))
            stored = e.dtype if dtype is None else dtype
            if e.dtype != wide(stored):
                e = self.lookup_padded(ids, wide(stored))
            e = e.to(stored)
        return e.movedim(-1, 1) if self.channels_first else e

    def lookup_padded(self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None) -> Tensor:
        """As `lookup`, with 0 for ids below 0."""
        return self.lookup(ids.clamp_min(0), dtype).masked_fill((ids < 0)[..., None], 0)

    @torch.no_grad()
    def initialize(
        self, z: Float[Tensor, "*latents"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> None:
        """Start from these latents, of all ranks together, if the start needs data and had none.

        The first forward pass in training does so by itself. Call this before a training engine
        copies the parameters (DeepSpeed, FSDP), because it would not see the change, and before
        `torch.compile` with fullgraph=True, because whether there are latents at all depends on
        data.
        """
        if self.waits_for_data:
            self._fit(self._rows(z, mask))

    @torch.no_grad()
    def _fit(self, rows: Tensor) -> None:
        tokens = torch.tensor(len(rows), device=rows.device)
        if int(total(tokens)) > 0:
            self.fit(rows.detach())

    def _rows(self, z: Tensor, mask: Tensor | None) -> Tensor:
        axis = 1 if self.channels_first else -1
        if z.shape[axis] != self.width:
            raise ValueError(
                f"latents {tuple(z.shape)} have {z.shape[axis]} channels on axis {axis}, but the "
                f"quantizer's width is {self.width}: set width or channels_first"
            )
        rows = z.movedim(1, -1) if self.channels_first else z
        if mask is not None:
            check_mask(mask, rows.shape[:-1])
        rows = rows.to(torch.promote_types(z.dtype, torch.float32))
        return rows.reshape(-1, self.width) if mask is None else rows[mask]

    def _unpacked(self, rows: Tensor, z: Tensor, mask: Tensor | None, *, fill: int) -> Tensor:
        lead = (z.shape[0], *z.shape[2:]) if self.channels_first else z.shape[:-1]
        if mask is None:
            return rows.reshape((*lead, *rows.shape[1:]))
        full = rows.new_full((*lead, *rows.shape[1:]), fill)
        full[mask] = rows
        return full

    def extra_repr(self) -> str:
        return f"width={self.width}"


def check_mask(mask: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless a mask is boolean and has the leading shape of the latents.

    Integers would be read as row numbers.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask of {mask.dtype}: give booleans, such as mask != 0")
    if mask.shape != torch.Size(shape):
        raise ValueError(f"mask {tuple(mask.shape)} for latents {tuple(shape)}: use one shape")


def check_each_once(levels: Sequence[AnyQuantizer], level: AnyQuantizer) -> None:
    """Raise ValueError if one grid is to be of two sizes."""
    if sum(other is level for other in levels) > 1:
        name = type(level).__name__
        raise ValueError(f"levels hold one {name} twice: make a new one for each, as grids shrink")


def refuse_behind_others(level: AnyQuantizer, levels: Sequence[AnyQuantizer], place: int) -> None:
    """Raise ValueError if codes of one length are to refine what other levels left over."""
    if place:
        name = type(level).__name__
        raise ValueError(
            f"level {place} of {len(levels)} is a {name}, whose codes are all of length 1, so that "
            "they refine nothing: put it into a Projected, which learns their scale, or use another"
        )


def _weighted(out: Quantized, weight: Tensor) -> Quantized:
    terms = {name: weight * term for name, term in out.losses.items()}
    return out._replace(loss=weight * out.loss, losses=terms)
