"""The classic vector quantizers: a codebook learned by gradient (VQ-VAE, arXiv:1711.00937), by
exponential moving averages (its appendix A.1), or on the sphere (VQGAN-FC, arXiv:2110.04627)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.core.bank import Bank, wide
from simvq_moe.core.choices import check_choice
from simvq_moe.core.collectives import copy_from_rank_0, sample, total
from simvq_moe.core.nearest import nearest
from simvq_moe.quantizers.base import (
    AnyQuantizer,
    Quantized,
    Quantizer,
    mean_squared_error,
    random_codebook,
    refuse_behind_others,
)
from simvq_moe.quantizers.restart import check_restart, restart_codes

Init = Literal["random", "kmeans"]

KMEANS_ROUNDS = 10

DRAWS_DECAY = 0.99
"""Weight of the past in the moving average of a learned code's draws."""


class VQ(Quantizer):
    """A codebook of free rows: a code moves only when it is selected.

    Args:
        codes: number of codes.
        width: channels of a code.
        init: "random": rows from N(0, 1/width), as SimVQ's; "kmeans": centres of the first batch.
        restart: a code that is drawn less often a step than this, by a moving average over all
            ranks, restarts at a random latent of the batch; 0: never.
        options: those of `Quantizer`.
    """

    draws: Tensor
    step: Tensor

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        init: Init = "random",
        restart: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(codes, width, **options)
        check_choice("init", init, Init)
        check_restart(restart)
        self.restart = restart
        self.bank = Bank(random_codebook(codes, width), transform="none")
        # restarts move a buffer that is added to the learned rows, because an optimizer with
        # weights of its own (DeepSpeed, FSDP) would undo a change of the parameter
        self.moved: Tensor | None = None
        self._base: Tensor | None = None
        if restart:
            del self.moved
            self.register_average("moved", torch.zeros(codes, width), torch.float32)
            self.register_average("draws", torch.ones(codes), torch.float32)
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        if init == "kmeans":
            self._wait_for_data()

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        if self.moved is None:
            return self.bank.rows(dtype)
        rows = self.bank.rows(wide(dtype))
        return (rows + self.moved.to(rows.dtype)).to(dtype or rows.dtype)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        if self.moved is None:
            return self.bank.lookup(ids, dtype)
        rows = self.bank.lookup(ids, wide(dtype))
        return (rows + self.moved[ids].to(rows.dtype)).to(dtype or rows.dtype)

    @property
    def changes_by_steps(self) -> bool:
        return self.moved is not None

    def quantize(self, z: Float[Tensor, "tokens width"]) -> Quantized:
        if self.waits and self.moved is not None and self.collects and not self._seen:
            # what restarts are measured from: an optimizer moves the rows before the step's end,
            # and what shards them over ranks takes them away
            self._base = self.bank.base.detach().clone()
        return super().quantize(z)

    @torch.no_grad()
    def update(
        self,
        z: Float[Tensor, "tokens width"],
        ids: Int[Tensor, " tokens"],
        parts: Sequence[int],
    ) -> None:
        """Restart the codes that are no longer drawn."""
        assert self.moved is not None
        ones = self.draws.new_ones(len(ids))
        drawn = total(self.draws.new_zeros(self.codes).index_add_(0, ids, ones))
        self.draws.lerp_(drawn, 1 - DRAWS_DECAY)
        restart_codes(
            self.moved,
            self.draws,
            z,
            idle=drawn == 0,
            below=self.restart,
            step=self.step,
            parts=parts,
            origin=self.bank.base if self._base is None else self._base,
        )
        self.step += 1
        self._base = None

    def drop_step(self) -> None:
        super().drop_step()
        self._base = None

    def fit(self, z: Float[Tensor, "tokens width"]) -> None:
        self.bank.base.copy_(kmeans(self.prepare(z), self.codebook(z.dtype)))
        self._started()


class CosineVQ(VQ):
    """A codebook on the unit sphere: latents and codes are l2-normalized before they meet.

    Published at width 8, between projections (`Projected`), where it is known as factorized codes.
    By itself it is no residual level behind another, for its codes are all of length 1.
    """

    def join(self, levels: Sequence[AnyQuantizer], place: int) -> None:
        refuse_behind_others(self, levels, place)

    def prepare(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        return to_sphere(z)

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        rows = to_sphere(super().codebook(wide(dtype)))
        return rows.to(dtype or rows.dtype)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        rows = to_sphere(super().lookup(ids, wide(dtype)))
        return rows.to(dtype or rows.dtype)


class EMAVQ(Quantizer):
    """A codebook of moving averages of the latents assigned to each code; it has no gradient.

    counts <- decay counts + (1 - decay) n, sums <- decay sums + (1 - decay) sum of z, code = sums /
    smoothed counts, with Laplace smoothing (counts + eps) / (total + codes eps) total. n and the
    sums are added over all ranks first. Counts start at one a code, so that a code that is never
    selected stays where it is until its count falls to `epsilon`.

    Args:
        codes: number of codes.
        width: channels of a code.
        decay: weight of the past in the averages.
        epsilon: Laplace smoothing, in draws.
        restart: a code whose count falls below this many draws a step restarts at a random latent
            of the batch, with a count of one; 0: never.
        init: "random": rows from N(0, 1/width); "kmeans": centres of the first batch.
        options: those of `Quantizer`, without a codebook loss.
    """

    sums: Tensor
    counts: Tensor
    codes_now: Tensor
    step: Tensor

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        restart: float = 0.0,
        init: Init = "random",
        **options: Any,
    ) -> None:
        super().__init__(codes, width, **options)
        check_choice("init", init, Init)
        check_restart(restart)
        self.decay = decay
        self.epsilon = epsilon
        self.restart = restart
        start = random_codebook(codes, width)
        self.register_average("codes_now", start, torch.float32)
        self.register_average("sums", start.clone(), torch.float32)
        self.register_average("counts", torch.ones(codes), torch.float32)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        if init == "kmeans":
            self._wait_for_data()

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        return self.codes_now.to(dtype or self.codes_now.dtype)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        return self.codes_now[ids].to(dtype or self.codes_now.dtype)

    def losses(
        self, z: Float[Tensor, "tokens width"], e: Float[Tensor, "tokens width"]
    ) -> dict[str, Tensor]:
        return {"commitment": mean_squared_error(z, e.detach())}

    def fit(self, z: Float[Tensor, "tokens width"]) -> None:
        self.codes_now.copy_(kmeans(z, self.codebook(z.dtype)))
        self.sums.copy_(self.codes_now)
        self._started()

    @property
    def changes_by_steps(self) -> bool:
        return True

    @torch.no_grad()
    def update(
        self,
        z: Float[Tensor, "tokens width"],
        ids: Int[Tensor, " tokens"],
        parts: Sequence[int],
    ) -> None:
        """Move the averages by the batch of all ranks."""
        sums, drawn = assigned(z.to(self.sums.dtype), ids, self.codes)
        self.sums.lerp_(sums, 1 - self.decay)
        self.counts.lerp_(drawn, 1 - self.decay)
        if self.restart:
            # sums and counts, or the next average would undo the restart
            restart_codes(
                self.sums,
                self.counts,
                z,
                idle=drawn == 0,
                below=self.restart,
                step=self.step,
                parts=parts,
            )
        all_counts = self.counts.sum()
        smoothed = (self.counts + self.epsilon) / (all_counts + self.codes * self.epsilon)
        self.codes_now.copy_(self.sums / (smoothed * all_counts)[:, None])
        self.step += 1


def to_sphere(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """x / |x|; below |x| = 1e-3 the length shrinks too, so that the gradient stays bounded."""
    return F.normalize(x, dim=-1, eps=1e-3)


def assigned(
    z: Float[Tensor, "tokens width"], ids: Int[Tensor, " tokens"], codes: int
) -> tuple[Float[Tensor, "codes width"], Float[Tensor, " codes"]]:
    """Sum and number of the latents of each code, over all ranks."""
    ones = z.new_ones(len(z), 1)
    joined = z.new_zeros(codes, z.shape[1] + 1).index_add_(0, ids, torch.cat([z, ones], 1))
    joined = total(joined)
    return joined[:, :-1], joined[:, -1]


@torch.no_grad()
def kmeans(
    z: Float[Tensor, "tokens width"], start: Float[Tensor, "codes width"]
) -> Float[Tensor, "codes width"]:
    """Centres of all ranks' latents after a few of Lloyd's rounds, from random latents.

    With fewer latents than codes the last codes keep their start.
    """
    chosen = sample(z, len(start), seed=0)
    centres = torch.cat([chosen, start[len(chosen) :]])
    for _ in range(KMEANS_ROUNDS):
        sums, counts = assigned(z, nearest(z, centres), len(centres))
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
    copy_from_rank_0(centres)
    return centres
