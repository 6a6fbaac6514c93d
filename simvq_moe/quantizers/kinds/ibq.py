"""Index backpropagation: every code has a gradient, through the softmax of its score
(IBQ, arXiv:2412.02692)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from simvq_moe.config.ranges import FACTOR, Range, Weight
from simvq_moe.config.registry import register
from simvq_moe.core.collectives import CALLS_OF_ENTROPY, mean_assignment_entropy
from simvq_moe.core.precision import full_precision
from simvq_moe.core.search.nearest import numbered
from simvq_moe.quantizers.base import Quantized
from simvq_moe.quantizers.codebook import SoftAssignment, mean_squared_error
from simvq_moe.quantizers.kinds.vq import VQ, Init
from simvq_moe.quantizers.options import LevelOptions


class IBQ(VQ):
    """Index backpropagation: the choice is the largest z · e, its gradient that of the softmax.

    z_q = one_hot(argmax p) E + (p - sg p) E with p = softmax(z E^T): all codes get a gradient, at
    the price of a tokens x codes matrix. The term "index" is |z_q - z|^2 through both factors. Two
    entropies of the assignment softmax(z E^T / temperature), in nats, join it as in `LFQ`: that of
    each token shall be low, that of the mean over all tokens high.

    Args:
        codes: number of codes.
        width: channels of a code.
        init: as for `VQ`.
        index_weight: weight of |z_q - z|^2.
        codebook_weight: beta, weight of |e - sg z|^2.
        commitment_weight: gamma, weight of |z - sg e|^2.
        temperature: softness of the assignment whose entropies are measured.
        entropy_weight: weight of the token entropy (lambda_E of the paper); 0: neither is computed.
        diversity_weight: weight of the entropy of the mean assignment, relative to the former.
        channels_first: latents are (batch, width, ...) instead of (..., width).
    """

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        init: Init = "random",
        index_weight: float = 1.0,
        codebook_weight: float = 0.25,
        commitment_weight: float = 1.0,
        temperature: float = 0.01,
        entropy_weight: float = 0.05,
        diversity_weight: float = 1.0,
        channels_first: bool = False,
    ) -> None:
        super().__init__(
            codes,
            width,
            init=init,
            codebook_weight=codebook_weight,
            commitment_weight=commitment_weight,
            channels_first=channels_first,
        )
        self.temperature = temperature
        self.weights["index"] = index_weight
        if entropy_weight:
            self.weights["token_entropy"] = entropy_weight
            self.weights["codebook_entropy"] = -entropy_weight * diversity_weight

    def assign(self, z: Float[Tensor, "tokens width"]) -> Int[Tensor, " tokens"]:
        return numbered(_scores(z, self.codebook(z.dtype)).argmax(1), z)

    def quantize(self, z: Float[Tensor, "tokens width"]) -> Quantized:
        E = self.codebook(z.dtype)
        logits = _scores(z, E)
        ids, p = numbered(logits.argmax(1), z), logits.softmax(1)
        self.counter.add(ids)
        e = E[ids]
        z_q = e + (p - p.detach()) @ E
        losses = self.losses(z, e) | {"index": mean_squared_error(z_q, z)}
        if "token_entropy" in self.weights:
            losses |= self._entropies(logits)
        loss = torch.stack([self.weights[name] * term for name, term in losses.items()]).sum()
        return Quantized(z_q, ids, loss, losses)

    @property
    def summed_numbers(self) -> int:
        # the mean assignment, and its gradient
        return 2 * self.codes if "token_entropy" in self.weights else 0

    @property
    def summing_calls(self) -> int:
        return CALLS_OF_ENTROPY if "token_entropy" in self.weights else 0

    def _entropies(self, logits: Float[Tensor, "tokens codes"]) -> dict[str, Tensor]:
        log_p = (logits / self.temperature).log_softmax(1)
        p = log_p.exp()
        return {
            "token_entropy": -(p * log_p).sum() / max(len(logits), 1),
            "codebook_entropy": mean_assignment_entropy(
                p.sum(0), len(logits), all_ranks=self.training
            ),
        }

    def soft_assign(
        self,
        z: Float[Tensor, "*latents"],
        neighbours: int,
        mask: Bool[Tensor, "*batch"] | None = None,
    ) -> SoftAssignment:
        """Not defined: codes are chosen by z · e and not by distance."""
        del z, neighbours, mask
        raise ValueError("IBQ has no nearest codes: its own soft assignment is softmax(z E^T)")


def _scores(
    z: Float[Tensor, "tokens width"], E: Float[Tensor, "codes width"]
) -> Float[Tensor, "tokens codes"]:
    """z · e in full precision, because the largest is chosen; a compiler knows no switches."""
    with nullcontext() if torch.compiler.is_compiling() else full_precision():
        return z @ E.T


@register
@dataclass(frozen=True)
class IBQOptions(LevelOptions):
    """Rows that all have a gradient, through the softmax of their scores (2412.02692)."""

    quantizer = IBQ
    kind: Literal["ibq"] = "ibq"
    codebook_weight: Weight = 0.25
    """Weight of |e - sg z|^2."""
    commitment_weight: Weight = 1.0
    """Weight of |z - sg e|^2."""
    entropy_weight: Weight = 0.05
    """Weight of each token's entropy less that of the mean assignment."""
    diversity_weight: Weight = 1.0
    """Weight of the entropy of the mean assignment, relative to that of a token's."""
    temperature: Annotated[float, Range(1e-6, FACTOR)] = 0.01
    """Softness of the assignment whose entropies these are."""
