"""Relatives of SimVQ: a map for each group of codes (Group-VQ, arXiv:2510.13331), a nonlinear map,
and IBQ (arXiv:2412.02692), where every code gets a gradient through the softmax of its score."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.core.bank import Bank
from simvq_moe.core.nearest import numbered
from simvq_moe.quantizers.base import Quantized, Quantizer, mean_squared_error, random_codebook
from simvq_moe.quantizers.vq import VQ, Init


class GroupVQ(Quantizer):
    """SimVQ with one map W_g and bias b_g for each contiguous group of codes.

    Args:
        codes: number of codes, a multiple of `groups`.
        width: channels of a code.
        groups: number of maps.
        options: those of `Quantizer`.
    """

    def __init__(self, codes: int, width: int, *, groups: int, **options: Any) -> None:
        super().__init__(codes, width, **options)
        if codes % groups:
            raise ValueError(f"codes {codes} is no multiple of groups {groups}: change either")
        bases = random_codebook(codes, width).chunk(groups)
        self.banks = nn.ModuleList(Bank(base, train_base=False, bias=True) for base in bases)

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        rows: list[Tensor] = []
        for bank in self.banks:
            assert isinstance(bank, Bank)
            rows.append(bank.rows(dtype))
        return torch.cat(rows)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        return self.codebook(dtype)[ids]


class MLPVQ(Quantizer):
    """SimVQ with a residual perceptron for a map: codes q + f(q), f two layers that start at 0.

    Args:
        codes: number of codes; their base rows q ~ N(0, 1/width) are frozen.
        width: channels of a code.
        hidden: channels between the two layers; None: 4 width.
        options: those of `Quantizer`.
    """

    def __init__(
        self, codes: int, width: int, *, hidden: int | None = None, **options: Any
    ) -> None:
        super().__init__(codes, width, **options)
        self.base: Tensor
        self.register_buffer("base", random_codebook(codes, width))
        self.up = nn.Linear(width, hidden or 4 * width)
        self.down = nn.Linear(hidden or 4 * width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        return self._map(self.base, dtype)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        return self._map(self.base[ids], dtype)

    def _map(self, q: Tensor, dtype: torch.dtype | None) -> Tensor:
        hidden = F.gelu(self.up(q.to(self.up.weight.dtype)))
        return (q + self.down(hidden)).to(dtype or q.dtype)


class IBQ(VQ):
    """Index backpropagation: the choice is the largest z · e, its gradient that of the softmax.

    z_q = one_hot(argmax p) E + (p - sg p) E with p = softmax(z E^T): all codes get a gradient, at
    the price of a tokens x codes matrix. The term "index" is |z_q - z|^2 through both factors.

    Args:
        codes: number of codes.
        width: channels of a code.
        init: as for `VQ`.
        index_weight: weight of |z_q - z|^2.
        codebook_weight: beta, weight of |e - sg z|^2.
        commitment_weight: gamma, weight of |z - sg e|^2.
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
        self.weights["index"] = index_weight

    def assign(self, z: Float[Tensor, "tokens width"]) -> Int[Tensor, " tokens"]:
        return numbered((z @ self.codebook(z.dtype).T).argmax(1), z)

    def quantize(self, z: Float[Tensor, "tokens width"]) -> Quantized:
        E = self.codebook(z.dtype)
        logits = z @ E.T
        ids, p = numbered(logits.argmax(1), z), logits.softmax(1)
        self.counter.add(ids)
        e = E[ids]
        z_q = e + (p - p.detach()) @ E
        losses = self.losses(z, e) | {"index": mean_squared_error(z_q, z)}
        loss = torch.stack([self.weights[name] * term for name, term in losses.items()]).sum()
        return Quantized(z_q, ids, loss, losses)
