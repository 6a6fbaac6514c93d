"""Relatives of SimVQ: a map for each group of codes (Group-VQ, arXiv:2510.13331), a nonlinear map,
and IBQ (arXiv:2412.02692), where every code gets a gradient through the softmax of its score."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from simvq_moe.core.bank import Bank, wide
from simvq_moe.core.choices import check_choice
from simvq_moe.core.collectives import copy_from_rank_0, mean_assignment_entropy
from simvq_moe.core.nearest import nearest, numbered
from simvq_moe.quantizers.base import (
    Quantized,
    Quantizer,
    SoftAssignment,
    mean_squared_error,
    random_codebook,
)
from simvq_moe.quantizers.simvq import MapInit, moments
from simvq_moe.quantizers.vq import VQ, Init


class GroupVQ(Quantizer):
    """SimVQ with one map W_g and bias b_g for each contiguous group of codes.

    Args:
        codes: number of codes, a multiple of `groups`.
        width: channels of a code.
        groups: number of maps.
        init: "identity": every W_g starts as the identity; "data": every group starts with the
            covariance and mean of the first batch over all ranks, as SimVQ does, so that both
            start from the same codes. Groups then differ by their base rows alone, independent
            draws, and part as each map learns from the latents that its own codes win.
        options: those of `Quantizer`.
    """

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        groups: int,
        init: MapInit = "identity",
        **options: Any,
    ) -> None:
        super().__init__(codes, width, **options)
        check_choice("init", init, MapInit)
        if groups < 1 or codes % groups:
            raise ValueError(f"codes {codes} is no multiple of groups {groups}: change either")
        base = random_codebook(codes, width).unflatten(0, (groups, -1))
        self.bank = Bank(base, transform="separate", train_base=False, bias=True)
        if init == "data":
            self._wait_for_data()

    def codebook(self, dtype: torch.dtype | None = None) -> Float[Tensor, "codes width"]:
        return self.bank.rows(dtype).flatten(0, 1)

    def lookup(
        self, ids: Int[Tensor, "*batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        assert self.bank.W is not None
        assert self.bank.bias is not None
        flat = ids.reshape(-1)
        group = flat // self.bank.base.shape[1]
        rows = self.bank.base.flatten(0, 1)[flat].to(wide(dtype) or self.bank.base.dtype)
        rows = map_by_group(rows, group, self.bank.W) + self.bank.bias.to(rows.dtype)[group]
        return rows.reshape((*ids.shape, self.width)).to(dtype or rows.dtype)

    def assign(self, z: Float[Tensor, "tokens width"]) -> Int[Tensor, " tokens"]:
        return nearest(z, self.bank.base.flatten(0, 1), W=self.bank.W, bias=self.bank.bias)

    def fit(self, z: Float[Tensor, "tokens width"]) -> None:
        assert self.bank.W is not None
        assert self.bank.bias is not None
        single = Bank(self.bank.base[0], train_base=False, bias=True)
        single.match(*moments(z))
        assert single.W is not None
        assert single.bias is not None
        self.bank.W.copy_(single.W)
        self.bank.bias.copy_(single.bias)
        for parameter in self.parameters():
            copy_from_rank_0(parameter)
        self._started()


def map_by_group(
    x: Float[Tensor, "tokens width"],
    group: Int[Tensor, " tokens"],
    maps: Float[Tensor, "groups width width"],
) -> Float[Tensor, "tokens width"]:
    """x_t @ maps[group_t], in (tokens + groups width) width^2 operations.

    Tokens are sorted into tiles of one group each, as many tiles as any grouping may need: shapes
    never depend on the data, and a tile of `width` tokens makes its map as large as itself.
    """
    groups, tile = len(maps), x.shape[1]
    number = torch.arange(len(x) // tile + groups, device=x.device)
    sizes = group.new_zeros(groups).index_add(0, group, torch.ones_like(group))
    needed = (sizes + tile - 1) // tile
    first_tile, first = needed.cumsum(0) - needed, sizes.cumsum(0) - sizes
    order = group.argsort(stable=True)
    by_group = group[order]
    within = torch.arange(len(x), device=x.device) - first[by_group]
    place = torch.empty_like(order).scatter(0, order, first_tile[by_group] * tile + within)
    packed = x.new_zeros(len(number) * tile, tile).index_copy(0, place, x)
    owner = torch.searchsorted(needed.cumsum(0), number, right=True).clamp_max(groups - 1)
    mapped = packed.unflatten(0, (-1, tile)) @ maps.to(x.dtype)[owner]
    return mapped.flatten(0, 1)[place]


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
        compute = wide(dtype) or q.dtype
        up, down = (
            [p.to(compute) for p in (layer.weight, layer.bias)] for layer in (self.up, self.down)
        )
        hidden = F.gelu(F.linear(q.to(compute), *up))
        return (q + F.linear(hidden, *down)).to(dtype or q.dtype)


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
        return numbered((z @ self.codebook(z.dtype).T).argmax(1), z)

    def quantize(self, z: Float[Tensor, "tokens width"]) -> Quantized:
        E = self.codebook(z.dtype)
        logits = z @ E.T
        ids, p = numbered(logits.argmax(1), z), logits.softmax(1)
        self.counter.add(ids)
        e = E[ids]
        z_q = e + (p - p.detach()) @ E
        losses = self.losses(z, e) | {"index": mean_squared_error(z_q, z)}
        if "token_entropy" in self.weights:
            losses |= self._entropies(logits)
        loss = torch.stack([self.weights[name] * term for name, term in losses.items()]).sum()
        return Quantized(z_q, ids, loss, losses)

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
