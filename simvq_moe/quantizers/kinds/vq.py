"""A codebook of free rows, learned by gradient (VQ-VAE, arXiv:1711.00937)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.registry import register
from simvq_moe.core.bank import Bank, wide
from simvq_moe.core.choices import check_choice, check_none
from simvq_moe.core.collectives import total
from simvq_moe.quantizers.base import Quantized
from simvq_moe.quantizers.codebook import Quantizer, random_codebook
from simvq_moe.quantizers.options import CodebookOptions, RestartingOptions
from simvq_moe.quantizers.parts.kmeans import kmeans
from simvq_moe.quantizers.parts.restart import CALLS, restart_codes, restart_problems

Init = Literal["random", "kmeans"]

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
        check_none(restart_problems(restart))
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
        dtype = dtype or self.bank.base.dtype
        rows = self.bank.rows(wide(dtype))
        return (rows + self.moved.to(rows.dtype)).to(dtype)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        if self.moved is None:
            return self.bank.lookup(ids, dtype)
        dtype = dtype or self.bank.base.dtype
        rows = self.bank.lookup(ids, wide(dtype))
        return (rows + self.moved[ids].to(rows.dtype)).to(dtype)

    @property
    def summed_numbers(self) -> int:
        return 0 if self.moved is None else self.codes  # draws; a restarted code adds its row

    @property
    def summing_calls(self) -> int:
        return 0 if self.moved is None else 1 + CALLS

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


def plain_vq(quantizer: Quantizer, bank: Bank) -> VQ:
    """A VQ with the codes of a bank, which quantizes as `quantizer` does otherwise."""
    with torch.device("meta"):  # codes of its own would be drawn, and are not wanted
        plain = VQ(
            quantizer.codes,
            quantizer.width,
            gradient=quantizer.gradient,
            codebook_weight=quantizer.weights["codebook"],
            commitment_weight=quantizer.weights["commitment"],
            channels_first=quantizer.channels_first,
        )
    plain.bank = bank
    plain.counter.to_empty(device=bank.base.device)
    return plain.train(quantizer.training)


@register
@dataclass(frozen=True)
class VQOptions(RestartingOptions, CodebookOptions):
    """Free rows, learned by gradient: a code moves only when it is chosen (VQ-VAE, 1711.00937)."""

    quantizer = VQ
    kind: Literal["vq"] = "vq"
