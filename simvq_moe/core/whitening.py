"""Whitening of what a router sees: one map shared by all experts' rows, set by data.

A router that scores by products sees (x - m) C^(-1/2), m and C the running mean and covariance of
its input over all tokens. That is the same as rows R C^(-1/2) and one bias an expert, so it is a
shared map of the rows as in SimVQ (arXiv:2411.02038, eq. 4) with the opposite exponent: codes under
a distance want to lie where the data are, C^(+1/2); keys under an inner product want to tell
directions apart, C^(-1/2). No gradient sets it, it needs no strength, and it folds away.

The map is applied to the rows, whose products with it cost experts x width^2 a step, whatever the
number of tokens. Moments and map change after a step alone, so all of a step sees the same router.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from simvq_moe.core.step_state import StepState
from simvq_moe.core.streams import own_stream
from simvq_moe.core.usage import once

WhiteningKind = Literal["full", "diagonal", "low_rank"]


class Whitening(StepState):
    """Running moments of vectors, and the map C^(-exponent/2) made of them.

    After the t-th step that counts, with weights decay^age in steps as in `RunningMean`:

        m <- m + w s        C <- (1 - w) C + w S - w^2 s s^T        w = decay^age / sum of such

    s and S are mean and second moment of the step's vectors about the m before it. Products are
    formed in float32 at least, and added up in float64. Eigenvalues below `floor`
    times their mean count as that. The map is scaled so that its output has the mean square of the
    input: logits start in the range that they would have without it. Before the first step m is 0
    and the map the identity.

    Args:
        width: channels of a vector.
        exponent: 1 whitens, 0 centres alone, -1 is the map that codes want.
        decay: weight of the past after a step.
        floor: least eigenvalue, as a share of the mean one.
        every: steps between two counts, each with a new map; the first `every` steps all count.
        centred: False: m stays 0 and C is the second moment about 0, whose map folds into rows
            alone, without biases; the mean is one more direction, the strongest if it is large.
    """

    mean: Tensor
    weight: Tensor
    steps: Tensor

    def __init__(
        self,
        width: int,
        *,
        exponent: float = 1.0,
        decay: float = 0.99,
        floor: float = 0.01,
        every: int = 10,
        centred: bool = True,
        sums: int,
    ) -> None:
        super().__init__(1 + width + sums)
        self.width, self.exponent, self.decay = width, exponent, decay
        self.floor, self.every, self.centred = floor, every, centred
        self.register_average("mean", torch.zeros(width), torch.float64)
        self.register_average("weight", torch.zeros(()), torch.float64)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.steps_done = 0
        """Equal to `steps`, and known without waiting for a device."""
        self._due, self._version = True, 0

    @torch.no_grad()
    def collect(self, x: Float[Tensor, "tokens width"]) -> None:
        """Count these in at the end of the step, if in training and the step counts."""
        if not self.collects:
            return
        dtype = torch.promote_types(x.dtype, torch.float32)
        tokens = torch.full_like(self.mean[:1], len(x))
        mean = x.sum(0, dtype=self.mean.dtype) / tokens.clamp_min(1)
        # about their own mean first, where nothing cancels, and from there about the running one
        seconds = self.seconds_of(x.to(dtype) - mean.to(dtype)).flatten()
        shift = mean - self.mean
        between = self.seconds_of((tokens.sqrt() * shift)[None]).flatten()
        sums = torch.cat([tokens, tokens * shift, seconds + between])
        self.pending += once(sums.to(self.pending.dtype))

    def apply_sums(self, sums: Float[Tensor, " size"]) -> None:
        tokens, first, seconds = sums.split([1, self.width, len(sums) - 1 - self.width])
        if not tokens or not sums.isfinite().all():  # a step of NaN would stay for ever
            return
        age = 1 if self.steps_done < self.every else self.every
        self.weight.mul_(self.decay**age).add_(1)
        w, shift = 1 / self.weight, self.centred * first / tokens
        self.mix(w, shift, seconds / tokens)
        self.mean += w * shift
        self.make_map()

    def end_step(self) -> None:
        self.steps += 1
        self._go_on_after(self.steps_done + 1)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of matrix products for a vector under the map and for its second moment."""
        return 0

    @abstractmethod
    def seconds_of(self, centred: Float[Tensor, "tokens width"]) -> Tensor:
        """Sums of second moments."""

    @abstractmethod
    def mix(self, w: Tensor, shift: Float64[Tensor, " width"], seconds: Tensor) -> None:
        """Take up a step's second moments, with weight w."""

    @abstractmethod
    def make_map(self) -> None:
        """Set the map from the covariance."""

    @abstractmethod
    def turn(self, rows: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """The rows under the map, which is its own transpose: turn(row) · x = row · map(x)."""

    @torch.no_grad()
    def fold(
        self, rows: Float[Tensor, "rows width"]
    ) -> tuple[Float[Tensor, "rows width"], Float[Tensor, " rows"]]:
        """Rows and biases with rows · x + bias = turn(row) · (x - m)."""
        turned = self.turn(rows.double())
        return turned.to(rows.dtype), (-turned @ self.mean.double()).to(rows.dtype)

    def powers(
        self, variances: Float64[Tensor, " directions"], rest: Tensor | float = 0.0, others: int = 0
    ) -> tuple[Float64[Tensor, " directions"], Tensor]:
        """Factors along directions of these variances, and along `others` more of variance `rest`.

        Each is the floored variance to the power of -exponent/2, times one scale for all.
        """
        rest = torch.as_tensor(rest, dtype=variances.dtype, device=variances.device)
        total = variances.sum() + others * rest
        least = (self.floor * total / self.width).clamp_min(torch.finfo(variances.dtype).tiny)
        factors = variances.clamp_min(least) ** (-self.exponent / 2)
        factor = rest.clamp_min(least) ** (-self.exponent / 2)
        after = (variances * factors.square()).sum() + others * rest * factor.square()
        scale = ((total + self.mean.square().sum()) / after).sqrt()
        # vectors that are all the same have no direction
        scale = torch.where(after > 0, scale, 1 / factor)
        return factors * scale, factor * scale

    @property
    def due(self) -> bool:
        unknown = torch.compiler.is_compiling() or self.steps.is_meta or self.steps.is_inference()
        if not unknown and self.steps._version != self._version:  # written by another's hand
            self._go_on_after(int(self.steps))
        return self._due

    def _go_on_after(self, steps: int) -> None:
        self.steps_done = steps
        self._due = steps < self.every or (steps + 1) % self.every == 0
        self._version = 0 if self.steps.is_inference() else self.steps._version

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.steps.is_meta:
            self._go_on_after(int(self.steps))

    def extra_repr(self) -> str:
        return f"width={self.width}, exponent={self.exponent}, every={self.every}"


class FullWhitening(Whitening):
    """Whitening by the whole covariance matrix.

    Args:
        width, options: see `Whitening`.
    """

    covariance: Tensor
    matrix: Tensor

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, sums=width**2, **options)
        self.register_average("covariance", torch.zeros(width, width), torch.float64)
        self.register_average("matrix", torch.eye(width), torch.float32)

    @property
    def multiply_adds(self) -> int:
        return self.width**2

    def seconds_of(self, centred: Float[Tensor, "tokens width"]) -> Tensor:
        return centred.T @ centred

    def mix(self, w: Tensor, shift: Float64[Tensor, " width"], seconds: Tensor) -> None:
        step = seconds.view_as(self.covariance) - w * shift.outer(shift)
        self.covariance.mul_(1 - w).add_(w * step)

    def make_map(self) -> None:
        variances, axes = torch.linalg.eigh(self.covariance)
        factors, _ = self.powers(variances.clamp_min(0))
        self.matrix.copy_(axes * factors @ axes.T)

    def turn(self, rows: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        return rows @ self.matrix.to(rows.dtype)


class DiagonalWhitening(Whitening):
    """Whitening by the variance of each channel alone: a control, which knows no directions.

    Args:
        width, options: see `Whitening`.
    """

    variances: Tensor
    factors: Tensor

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, sums=width, **options)
        self.register_average("variances", torch.zeros(width), torch.float64)
        self.register_average("factors", torch.ones(width), torch.float32)

    def seconds_of(self, centred: Float[Tensor, "tokens width"]) -> Tensor:
        return centred.square().sum(0)

    def mix(self, w: Tensor, shift: Float64[Tensor, " width"], seconds: Tensor) -> None:
        self.variances.mul_(1 - w).add_(w * (seconds - w * shift.square()))

    def make_map(self) -> None:
        self.factors.copy_(self.powers(self.variances.clamp_min(0))[0])

    def turn(self, rows: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        return rows * self.factors.to(rows.dtype)


class LowRankWhitening(Whitening):
    """Whitening by the largest directions and one variance for the rest, for large widths.

    Directions follow C by one step of orthogonal iteration a count (Golub and Van Loan, Matrix
    Computations, section 8.2): neither C nor its eigenvectors are ever formed, so memory, sums over
    ranks and time grow with width x rank.

    Args:
        width: see `Whitening`.
        rank: number of directions, below the width.
        options: see `Whitening`.

    Raises:
        ValueError: the rank is not below the width.
    """

    axes: Tensor
    variances: Tensor
    total: Tensor
    factors: Tensor
    factor: Tensor

    def __init__(self, width: int, *, rank: int = 32, **options: Any) -> None:
        if not 0 < rank < width:
            raise ValueError(
                f"rank {rank} of a low-rank whitening of width {width}: use 1 to {width - 1}, or "
                "the full one"
            )
        super().__init__(width, sums=1 + width * rank, **options)
        with own_stream():
            axes = nn.init.orthogonal_(torch.empty(width, rank, dtype=torch.float64))
        self.register_average("axes", axes, torch.float64)
        self.register_average("variances", torch.zeros(rank), torch.float64)
        self.register_average("total", torch.zeros(()), torch.float64)
        self.register_average("factors", torch.ones(rank), torch.float32)
        self.register_average("factor", torch.ones(()), torch.float32)

    @property
    def multiply_adds(self) -> int:
        return 2 * self.axes.numel()

    def seconds_of(self, centred: Float[Tensor, "tokens width"]) -> Tensor:
        along = centred.T @ (centred @ self.axes.to(centred.dtype))
        return torch.cat([centred.square().sum().view(1), along.flatten()])

    def mix(self, w: Tensor, shift: Float64[Tensor, " width"], seconds: Tensor) -> None:
        square, along = seconds[0], seconds[1:].view_as(self.axes)
        self.total.mul_(1 - w).add_(w * (square - w * shift.square().sum()))
        step = along - w * shift.outer(shift @ self.axes)
        # C axes, where the old C has those axes for eigenvectors
        image = (1 - w) * self.axes * self.variances + w * step
        axes, variances, _ = torch.linalg.svd(image, full_matrices=False)
        self.axes.copy_(axes)
        self.variances.copy_(variances)

    def make_map(self) -> None:
        others = self.width - len(self.variances)
        rest = (self.total - self.variances.sum()).clamp_min(0) / others
        factors, factor = self.powers(self.variances, rest, others)
        self.factors.copy_(factors)
        self.factor.copy_(factor)

    def turn(self, rows: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        axes, factor = self.axes.to(rows.dtype), self.factor.to(rows.dtype)
        return rows * factor + (rows @ axes) * (self.factors.to(rows.dtype) - factor) @ axes.T


def build_whitening(
    kind: WhiteningKind, width: int, *, rank: int = 32, **options: Any
) -> Whitening:
    """A whitening of a kind; options are those of `Whitening`.

    Raises:
        ValueError: the kind is unknown, or the rank does not fit the width.
    """
    if kind == "low_rank":
        return LowRankWhitening(width, rank=rank, **options)
    kinds = {"full": FullWhitening, "diagonal": DiagonalWhitening}
    if kind not in kinds:
        raise ValueError(f"whitening {kind!r}: choose one of {get_args(WhiteningKind)}")
    return kinds[kind](width, **options)
