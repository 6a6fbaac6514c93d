"""One codebook: searched for the nearest row, its losses, its usage, and its steps.

The objective is VQ-VAE's (arXiv:1711.00937, eq. 3) with SimVQ's names (arXiv:2411.02038, eq. 4):
loss = beta |e - sg z|^2 + gamma |z - sg e|^2, each term a mean over elements, beta =
`codebook_weight`, gamma = `commitment_weight`; the output is z + sg(e - z).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from simvq_moe.core.choices import check_choice
from simvq_moe.core.gradient import ESTIMATORS, IN_EVALUATION, Gradient
from simvq_moe.core.search.nearest import nearest, nearest_few
from simvq_moe.core.step_state import FollowsSteps
from simvq_moe.core.usage import UsageCounter, first_run
from simvq_moe.quantizers.base import PADDING, AnyQuantizer, Quantized


class SoftAssignment(NamedTuple):
    """The codes nearest to each latent, the nearest first, and how it divides between them."""

    ids: Tensor
    """int64, the leading shape of z and an axis of neighbours; `PADDING` where masked."""
    weights: Tensor
    """Positive, a latent's sum to 1; 0 where masked."""


class Seen(NamedTuple):
    """What a forward pass shows codes that change by steps."""

    latents: Tensor
    ids: Tensor
    first: Tensor | None
    """Of a compiled pass, whether it is no run again; None: it is none."""


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
        self.weights = {"codebook": codebook_weight, "commitment": commitment_weight}
        self.counter = UsageCounter(codes, kind="codes")
        self.initialized: Tensor | None = None
        self._waits = False
        self._seen: list[Seen] = []
        """The step so far, of codes that change by it."""

    @property
    def waits_for_data(self) -> bool:
        if self._waits:  # asked again, because another's hand may have written the state
            _note_initialized(self, None)
        return self._waits

    @property
    def usage(self) -> Int[Tensor, " codes"]:
        """int64: draws of each code counted since the window began."""
        return self.counter.counts

    @abstractmethod
    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        """Every code, computed in `dtype` (None: as stored)."""

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
            self._collect(z.detach(), ids)
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
        return (ESTIMATORS if self.training else IN_EVALUATION)[self.gradient](z, e)

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

    def _collect(self, z: Tensor, ids: Tensor) -> None:
        first = first_run(z) if torch.compiler.is_compiling() else None
        if self.waits:
            self._seen.append(Seen(z, ids, first))
            return
        states = list(self.buffers(recurse=False))
        before = [] if first is None else [state.clone() for state in states]
        self._seen.append(Seen(z, ids, None))
        self.end_step()
        if first is not None:
            for state, old in zip(states, before, strict=True):
                state.copy_(torch.where(first, state, old))

    def end_step(self) -> None:
        seen = [part for part in self._seen if part.first is None or bool(part.first)]
        self._seen = []
        if seen:
            latents, ids, _ = zip(*seen, strict=True)
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
