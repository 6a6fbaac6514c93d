"""What every quantizer shares: layout, masks and precision; one codebook, its losses and usage.

The objective is VQ-VAE's (arXiv:1711.00937, eq. 3) with SimVQ's names (arXiv:2411.02038, eq. 4):
loss = beta |e - sg z|^2 + gamma |z - sg e|^2, each term a mean over elements, beta =
`codebook_weight`, gamma = `commitment_weight`; the output is z + sg(e - z).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from simvq_moe.core.bank import wide
from simvq_moe.core.choices import check_choice
from simvq_moe.core.collectives import share_of_tokens, total
from simvq_moe.core.gradient import ESTIMATORS, Gradient, straight_through
from simvq_moe.core.ids import as_ids
from simvq_moe.core.search.nearest import nearest, nearest_few
from simvq_moe.core.state import Stateful
from simvq_moe.core.step_state import FollowsSteps
from simvq_moe.core.usage import UsageCounter
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


class SoftAssignment(NamedTuple):
    """The codes nearest to each latent, the nearest first, and how it divides between them."""

    ids: Tensor
    """int64, the leading shape of z and an axis of neighbours; `PADDING` where masked."""
    weights: Tensor
    """Positive, a latent's sum to 1; 0 where masked."""


class AnyQuantizer(Pretrained, Stateful):
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

    def quantize(self, z: Float[Tensor, "tokens width"]) -> Quantized:
        """Codes, ids and losses of packed rows."""
        raise NotImplementedError

    def assign(self, z: Float[Tensor, "tokens width"]) -> Int[Tensor, "tokens ..."]:
        """Ids of packed rows, without a gradient."""
        raise NotImplementedError

    def lookup(self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None) -> Tensor:
        """The codes named by ids, all valid, computed in `dtype` (None: as stored)."""
        raise NotImplementedError

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
            ids: of any integer dtype; those below 0 are padding.

        Raises:
            ValueError: ids are no integers: True and False would be read as a mask.
        """
        ids = as_ids(ids)
        padding = (ids < 0).flatten(-self.id_axes).any(-1) if self.id_axes else ids < 0
        ids = ids.clamp_min(0)
        with torch.autocast(ids.device.type, enabled=False):
            e = self.lookup(ids, wide(dtype))
            stored = e.dtype if dtype is None else dtype
            if e.dtype != wide(stored):
                e = self.lookup(ids, wide(stored))
            e = e.to(stored).masked_fill(padding[..., None], 0)
        return e.movedim(-1, 1) if self.channels_first else e

    @torch.no_grad()
    def initialize(
        self, z: Float[Tensor, "*latents"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> None:
        """Start from these latents, of all ranks together, if the start needs data and had none.

        The first forward pass in training does so by itself. Call this before a training engine
        copies the parameters (DeepSpeed, FSDP), for it would not see the change, and before
        `torch.compile` with fullgraph=True, for whether there are latents at all depends on data.
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


class Quantizer(AnyQuantizer, FollowsSteps):
    """One codebook of `codes` rows of `width` channels, searched for the nearest row.

    Subclasses give `codebook` and `lookup`; `prepare`, `assign`, `losses`, `pass_gradient`,
    `changes_by_steps` and `update` are theirs to change.

    Args:
        codes: number of codes.
        width: channels of a code.
        gradient: how the gradient of the output reaches the latents.
        codebook_weight: beta, weight of |e - sg z|^2.
        commitment_weight: gamma, weight of |z - sg e|^2.
        channels_first: latents are (batch, width, ...) instead of (..., width).
    """

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        gradient: Gradient = "straight_through",
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        channels_first: bool = False,
    ) -> None:
        super().__init__(width, channels_first=channels_first)
        if codes < 2:
            raise ValueError(f"codes {codes} < 2: a codebook needs at least two codes")
        self.codes = codes
        check_choice("gradient", gradient, Gradient)
        self.gradient: Gradient = gradient
        self.estimator = ESTIMATORS[gradient]
        self.weights = {"codebook": codebook_weight, "commitment": commitment_weight}
        self.counter = UsageCounter(codes, kind="codes")
        self.initialized: Tensor | None = None
        self._waits = False
        self._seen: list[tuple[Tensor, Tensor]] = []
        """Latents and ids of the step so far, of codes that change by them."""

    @property
    def waits_for_data(self) -> bool:
        return self._waits

    @property
    def usage(self) -> Int[Tensor, " codes"]:
        """int64: draws of each code counted since the window began."""
        return self.counter.counts

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        """Every code, computed in `dtype` (None: as stored)."""
        raise NotImplementedError

    def prepare(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        """The latents as they are compared with the codes."""
        return z

    def assign(self, z: Float[Tensor, "tokens width"]) -> Int[Tensor, " tokens"]:
        z = self.prepare(z)
        return nearest(z, self.codebook(z.dtype))

    def quantize(self, z: Float[Tensor, "tokens width"]) -> Quantized:
        with torch.no_grad():
            ids = self.assign(z)
        self.counter.add(ids)
        z = self.prepare(z)
        e = self.lookup(ids, z.dtype)
        losses = self.losses(z, e)
        weighted = [self.weights[name] * term for name, term in losses.items()]
        z_q = self.pass_gradient(z, e)
        if self.changes_by_steps and self.collects:
            self._seen.append((z.detach(), ids))
            if not self.waits:
                self.end_step()
        return Quantized(z_q, ids, sum(weighted, start=z.new_zeros(())), losses)

    def losses(
        self, z: Float[Tensor, "tokens width"], e: Float[Tensor, "tokens width"]
    ) -> dict[str, Tensor]:
        """The terms of the loss by name, unweighted."""
        return {
            "codebook": mean_squared_error(e, z.detach()),
            "commitment": mean_squared_error(z, e.detach()),
        }

    def pass_gradient(
        self, z: Float[Tensor, "tokens width"], e: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, "tokens width"]:
        """The codes, with a gradient for the latents; noise stands for them in training alone."""
        exact = self.gradient == "noise_substitution" and not self.training
        return straight_through(z, e) if exact else self.estimator(z, e)

    @property
    def changes_by_steps(self) -> bool:
        """Whether `update` has something to do."""
        return False

    def update(
        self,
        z: Float[Tensor, "tokens width"],
        ids: Int[Tensor, " tokens"],
        parts: Sequence[int],
    ) -> None:
        """Change the codes by a step's latents and their ids.

        Args:
            z, ids: of all forward passes in training since the last step.
            parts: how many latents each of them had.
        """

    def end_step(self) -> None:
        if self._seen:
            latents, ids = zip(*self._seen, strict=True)
            self._seen = []
            whole = (latents[0], ids[0]) if len(ids) == 1 else (torch.cat(latents), torch.cat(ids))
            self.update(*whole, [len(part) for part in ids])

    def drop_step(self) -> None:
        self._seen = []

    @torch.no_grad()
    def soft_assign(
        self,
        z: Float[Tensor, "*latents"],
        neighbours: int,
        mask: Bool[Tensor, "*batch"] | None = None,
    ) -> SoftAssignment:
        """The `neighbours` nearest codes with weights 1/d^2 over their sum, d the distance.

        This is the membership of the fuzzy nearest-neighbour rule (Keller et al., IEEE Trans. SMC
        15(4), 1985) and of fuzzy c-means (Bezdek, 1981), both at m = 2. Only ratios of
        distances enter, so there is no temperature to choose: scaling latents and codes together,
        rotating or shifting them changes nothing. A latent on a code is that code's alone, or
        equally of all codes at that very point. Weights flatten with the width, as distances do,
        and with `neighbours`: compare them at equal `neighbours`.

        Raises:
            ValueError: there are fewer codes than neighbours.
        """
        rows = self._rows(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            rows = self.prepare(rows)
            ids, square = nearest_few(rows, self.codebook(rows.dtype), neighbours)
        ratio = square[:, :1] / square
        # 0/0 stands for a latent on a code
        ratio = torch.where(square[:, :1] > 0, ratio, (square == 0).to(ratio.dtype))
        weights = ratio / ratio.sum(1, keepdim=True)
        return SoftAssignment(
            self._unpacked(ids, z, mask, fill=PADDING), self._unpacked(weights, z, mask, fill=0)
        )

    def _wait_for_data(self) -> None:
        """Start at `initialize`; the checkpoint remembers that it happened."""
        del self.initialized
        self.register_buffer("initialized", torch.tensor(False))
        self._waits = True
        self.register_load_state_dict_post_hook(_note_initialized)

    def _started(self) -> None:
        assert self.initialized is not None
        self.initialized.fill_(True)
        self._waits = False

    def extra_repr(self) -> str:
        return f"codes={self.codes}, width={self.width}"


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


def _note_initialized(module: nn.Module, _: Any) -> None:
    assert isinstance(module, Quantizer)
    assert module.initialized is not None
    if not module.initialized.is_meta:
        module._waits = not bool(module.initialized)


def mean_squared_error(
    x: Float[Tensor, "tokens width"], target: Float[Tensor, "tokens width"]
) -> Float[Tensor, ""]:
    """Mean over elements; 0 if there are none, with a gradient of 0."""
    return F.mse_loss(x, target, reduction="sum") / max(x.numel(), 1)


def random_codebook(codes: int, width: int) -> Float[Tensor, "codes width"]:
    """Rows from N(0, 1/width), so that a row has length about 1 (SimVQ, section 4.3)."""
    return torch.randn(codes, width) / width**0.5
