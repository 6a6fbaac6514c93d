"""Rows that share one linear map: rows = base @ W (SimVQ, arXiv:2411.02038, eq. 4).

Codebook rows, router rows and the experts' stacked projections are all banks. W is the shared
basis of its rows: every update of W moves every row, selected or not, and W folds into the rows.
"""

from __future__ import annotations

from functools import reduce
from typing import Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.core.choices import check_choice
from simvq_moe.core.precision import full_precision
from simvq_moe.core.search.centring import spread_sample

Transform = Literal["none", "diagonal", "linear", "low_rank", "separate"]


class Bank(nn.Module):
    """Rows of one width, each the same linear map of its own base row.

    Args:
        base: start of the base rows, (*rows, base_width); any number of leading axes.
        width: width of the mapped rows; None: that of the base.
        transform: "linear": a full matrix W, from the identity (semi-orthogonal where
            base_width != width); "diagonal": one factor a channel, from ones; "low_rank":
            W = I + A B, from B = 0; "none": rows = base. "separate": a full matrix for each slot
            of the first axis, from the identity: as many parameters without sharing, the control.
        train_base: learn the base rows; otherwise they are a buffer, so that no optimizer and no
            change of the parameters' precision touches them.
        bias: add one learned vector to every row, from zeros; with separate maps one a slot.
        rank: inner width of A B.

    Raises:
        ValueError: the transform is unknown, or changes the width without being "linear".
    """

    def __init__(
        self,
        base: Float[Tensor, "*rows base_width"],
        *,
        width: int | None = None,
        transform: Transform = "linear",
        train_base: bool = True,
        bias: bool = False,
        rank: int = 8,
    ) -> None:
        super().__init__()
        base_width = base.shape[-1]
        width = base_width if width is None else width
        check_choice("transform", transform, Transform)
        if transform != "linear" and width != base_width:
            raise ValueError(
                f"transform {transform!r} keeps the width, but base_width {base_width} != width "
                f"{width}: use transform='linear' or equal widths"
            )
        self.transform: Transform = transform
        self.width = width
        self.base: Tensor
        if train_base:
            self.base = nn.Parameter(base.detach().clone())
        else:
            self.register_buffer("base", base.detach().clone())
        self.W: Tensor | None = None
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        if transform == "low_rank":
            with torch.random.fork_rng(devices=[]):  # numbers drawn later stay the same
                A = torch.randn(width, rank, dtype=base.dtype) / width**0.5
            self.A = nn.Parameter(A.to(base.device))
            self.B = nn.Parameter(base.new_zeros(rank, width))
        elif transform != "none":
            self.W = _start_of_map(transform, base, width)
        self.bias: Tensor | None = None
        if bias:
            shape = (len(base), width) if transform == "separate" else (width,)
            self.bias = nn.Parameter(base.new_zeros(shape))
        self._kept: tuple[list[object], list[Tensor], Tensor] | None = None

    @property
    def maps(self) -> list[Tensor]:
        """The parameters of the map, without the bias; empty for transform "none"."""
        return [p for p in (self.W, self.A, self.B) if p is not None]

    @property
    def _stored(self) -> torch.dtype:
        """The widest dtype of base and map."""
        return reduce(torch.promote_types, (t.dtype for t in (self.base, *self.maps)))

    @property
    def shared(self) -> bool:
        """Whether one map, or none, serves all rows, so that it may follow a sum over rows."""
        return self.transform != "separate"

    def map(self, x: Float[Tensor, "*lead base_width"]) -> Float[Tensor, "*lead width"]:
        """Apply W. It is linear, so a shared one may follow a weighted sum over rows.

        With separate maps the first axis of x names the slots.
        """
        if not self.maps:
            return x
        dtype = torch.promote_types(x.dtype, self.maps[0].dtype)
        x = x.to(dtype)
        if self.A is not None and self.B is not None:
            return x + (x @ self.A.to(dtype)) @ self.B.to(dtype)
        assert self.W is not None
        W = self.W.to(dtype)
        return x * W if self.transform == "diagonal" else x @ W

    def rows(self, dtype: torch.dtype | None = None) -> Float[Tensor, "*rows width"]:
        """Every row in `dtype` (None: as stored), computed in float32 at least."""
        dtype = dtype or self._stored
        rows = self.map(self.base.to(wide(dtype)))
        if self.bias is None or self.shared:
            rows = self._shift(rows)
        else:
            rows = rows + self.bias.to(rows.dtype).unflatten(0, (-1, *[1] * (rows.ndim - 2)))
        return rows.to(dtype)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "... width"]:
        """The rows named by ids. Gathers first: the cost follows the batch, not the bank."""
        dtype = dtype or self._stored
        base = self.base[ids].to(wide(dtype))
        if self.shared:
            rows = self._shift(self.map(base))
        else:
            assert self.W is not None
            rows = base @ self.W[ids].to(base.dtype)
            rows = rows if self.bias is None else rows + self.bias[ids].to(rows.dtype)
        return rows.to(dtype)

    def score(self, x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead rows"]:
        """x @ rows().T of a bank with one row axis, with W moved to the side of x."""
        scores = self.pull(x) @ self.base.to(x.dtype).T
        return scores if self.bias is None else scores + x @ self.bias.to(x.dtype)[:, None]

    def pull(self, x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead base_width"]:
        """x @ W.T, the adjoint of `map`: x · map(row) = pull(x) · row. For a shared map."""
        if self.A is not None and self.B is not None:
            return x + (x @ self.B.to(x.dtype).T) @ self.A.to(x.dtype).T
        if self.W is None:
            return x
        W = self.W.to(x.dtype)
        return x * W if self.transform == "diagonal" else x @ W.mT

    def matrix(self) -> Float[Tensor, "*slots base_width width"]:
        """The map as a dense matrix in float64: one, or one a slot; the identity without a map."""
        base_width = self.base.shape[-1]
        eye = torch.eye(base_width, self.width, dtype=torch.float64, device=self.base.device)
        if self.transform in ("linear", "separate"):
            assert self.W is not None
            return self.W.double()
        return self.map(eye)

    @torch.no_grad()
    def folded_rows(self, dtype: torch.dtype) -> Float[Tensor, "*rows width"]:
        """`rows`, without a gradient and kept until the map changes, for use in evaluation.

        W and bias are compared by value, because what writes to `.data` leaves no other trace. Of
        the base, which is large, some rows are. One that is learned, or was made in inference mode,
        which counts no changes, has no kept rows.
        """
        if isinstance(self.base, nn.Parameter) or self.base.is_inference():
            return self._exact_rows(dtype)
        now = [dtype, self.base.data_ptr(), self.base._version]
        learned = [p.detach() for p in (*self.maps, self.bias) if p is not None]
        learned.append(spread_sample(self.base))
        if self._kept is not None:
            key, values, rows = self._kept
            same = key == now and [v.dtype for v in values] == [p.dtype for p in learned]
            if same and all(torch.equal(v, p) for v, p in zip(values, learned, strict=True)):
                return rows
        self._kept = (now, [p.clone() for p in learned], self._exact_rows(dtype))
        return self._kept[2]

    def _exact_rows(self, dtype: torch.dtype | None) -> Float[Tensor, "*rows width"]:
        """`rows`, whatever the process allows its products of matrices elsewhere."""
        with full_precision():
            return self.rows(dtype)

    def train(self, mode: bool = True) -> Bank:
        """Training has no use for folded rows: they are dropped."""
        self._kept = None
        return super().train(mode)

    @torch.no_grad()
    def fold(self) -> Bank:
        """The same rows with W and bias merged in: nothing of the map remains at inference."""
        return Bank(self._exact_rows(None), transform="none", train_base=True).train(self.training)

    @torch.no_grad()
    def match(
        self, mean: Float[Tensor, " width"], covariance: Float[Tensor, "width width"]
    ) -> None:
        """Set W and bias so that rows of a base from N(0, 1/base_width) have these moments.

        W = sqrt(base_width) covariance^(1/2), or its diagonal; the largest principal directions
        where base_width < width.

        Raises:
            ValueError: the bank lacks W or the bias.
        """
        if self.W is None or self.bias is None:
            raise ValueError("only a bank with W and a bias can match moments: give it both")
        base_width = self.base.shape[-1]
        self.bias.copy_(mean)
        if self.transform == "diagonal":
            self.W.copy_((base_width * covariance.diagonal()).sqrt())
            return
        variances, axes = torch.linalg.eigh(covariance)
        scaled = axes * (base_width * variances.clamp_min(0)).sqrt()
        if base_width < self.width:
            self.W.copy_(scaled[:, -base_width:].T)
        else:
            # orthonormal columns in front leave q^T q as it is
            front = torch.linalg.qr(self.W.double()).Q
            self.W.copy_(front @ scaled @ axes.T)

    @torch.no_grad()
    def identity_distance(self) -> Float[Tensor, ""]:
        """Frobenius distance of W from the identity, over sqrt(width); separate maps: the mean."""
        W = self.matrix()
        eye = torch.eye(*W.shape[-2:], dtype=W.dtype, device=W.device)
        return ((W - eye).norm(dim=(-2, -1)) / self.width**0.5).mean()

    def _shift(self, rows: Tensor) -> Tensor:
        """Rows shifted by the one bias of all."""
        return rows if self.bias is None else rows + self.bias.to(rows.dtype)

    def extra_repr(self) -> str:
        learned = isinstance(self.base, nn.Parameter)
        return f"base={tuple(self.base.shape)}, transform={self.transform}, train_base={learned}"


@overload
def wide(dtype: torch.dtype) -> torch.dtype: ...
@overload
def wide(dtype: None) -> None: ...
def wide(dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype to compute in for a result in this one: float32 at least."""
    return None if dtype is None else torch.promote_types(dtype, torch.float32)


def _start_of_map(transform: Transform, base: Tensor, width: int) -> nn.Parameter:
    base_width, own = base.shape[-1], {"dtype": base.dtype, "device": base.device}
    if transform == "diagonal":
        return nn.Parameter(torch.ones(width, **own))
    if transform == "separate":
        return nn.Parameter(torch.eye(width, **own).repeat(len(base), 1, 1))
    if base_width == width:
        return nn.Parameter(torch.eye(width, **own))
    return nn.Parameter(nn.init.orthogonal_(torch.empty(base_width, width, **own)))


def effective_rank(singular_values: Float[Tensor, " rank"]) -> Float[Tensor, ""]:
    """exp of the entropy of the normalized singular values (Roy and Vetterli, EUSIPCO 2007)."""
    share = singular_values / singular_values.sum()
    return torch.special.entr(share).sum().exp()


def stable_rank(singular_values: Float[Tensor, " rank"]) -> Float[Tensor, ""]:
    """Squared Frobenius norm over squared spectral norm (Rudelson and Vershynin, 2007)."""
    squared = singular_values.square()
    return squared.sum() / squared.max()
