"""The experts of a layer as two banks: stacked first and last projections, each with its map."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.config.moe import ExpertOptions, MapOptions
from simvq_moe.core.bank import Bank
from simvq_moe.core.streams import normal_part, own_stream
from simvq_moe.moe.expert_kinds import GeluExpert
from simvq_moe.moe.maps import NoMap

GELU, PLAIN = GeluExpert(), NoMap()


class Experts(nn.Module):
    """MLPs E_i(x) = f(x U_i^T) D_i, or f(x G_i^T, x U_i^T) D_i, f an activation (`expert_kinds`).

    D_i is (hidden, width); the bank `up` holds U_i (hidden, width), of gated kinds G_i above U_i. A
    shared map on the inputs belongs to the rows of `up` (x A^T), one on the outputs to those of
    `down`. Both are linear, so the layer applies them once a token by `enter` and `leave`, and
    `forward` leaves them out; separate maps, one an expert, are part of `forward`.

    Args:
        width: channels of a token.
        hidden: channels inside an expert.
        experts: number of experts.
        expert: kind of the networks.
        in_map, out_map: map of the first and of the last projections.
        out_bias: one learned vector added to every token's sum of outputs.
        bias: one learned vector added to each expert's outputs, as `fold_` makes of `out_bias`.
        key_rank: not 0: the first projection, of gated kinds G_i, is U_i K_i with U_i (hidden,
            key_rank) and keys K_i (key_rank, width) that `forward` is given, see
            `SelfSelectingRouter`.
        part: (i, n): hold only the i-th of n equal parts, started as if all were here.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        *,
        expert: ExpertOptions = GELU,
        in_map: MapOptions = PLAIN,
        out_map: MapOptions = PLAIN,
        out_bias: bool = False,
        bias: bool = False,
        key_rank: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        nn.Module.__init__(self)  # a subclass has a second parent, which is not to be set up
        self.num_experts, self.part = experts, part
        size = experts // part[1]
        self.mine = slice(part[0] * size, (part[0] + 1) * size)
        self.expert = expert
        self.hidden, self.width, self.key_rank = hidden, width, key_rank
        starts = dict(self._starts(width**-0.5, hidden**-0.5))
        # a bank copies its start, which goes at once
        self.up: Bank = in_map.bank(starts.pop("up"))
        self.down: Bank = out_map.bank(starts.pop("down"))
        self.gate: Bank | None = None
        """(experts, hidden, key_rank): what a gate makes of keys; `up` is then the rest."""
        if "gate" in starts:
            self.gate = NoMap(train_base=in_map.train_base).bank(starts.pop("gate"))
        self.out_bias = nn.Parameter(torch.zeros(width)) if out_bias else None
        self.bias = nn.Parameter(torch.zeros(size, width)) if bias else None
        """(experts, width)."""

    def enter(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """What the experts see of tokens: x A^T under a shared map A."""
        return self.up.pull(x) if self.up.shared else x

    def leave(self, y: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """What becomes of a gated sum of outputs: y W + b under a shared map W."""
        y = self.down.map(y) if self.down.shared else y
        return y if self.out_bias is None else y + self.out_bias.to(y.dtype)

    @property
    def banks(self) -> list[Bank]:
        """Every bank of the experts."""
        return [bank for bank in (self.gate, self.up, self.down) if bank is not None]

    def forward(
        self,
        x: Float[Tensor, "assignments width"],
        counts: Int[Tensor, " experts"],
        keys: Float[Tensor, "all_experts key_rank width"] | None = None,
    ) -> Float[Tensor, "assignments width"]:
        """Outputs before the shared map of rows sorted by expert, counts[i] rows for expert i.

        Args:
            keys: of all experts, wherever they are.
        """
        hidden = self.expert.activate(self._first(x, counts, keys))
        y = grouped_product(hidden, _weights(self.down), counts)
        if self.bias is None:
            return y
        return y + self.bias.to(y.dtype).repeat_interleave(counts, 0, output_size=len(y))

    def _first(self, x: Tensor, counts: Tensor, keys: Tensor | None) -> Tensor:
        if keys is None:
            return grouped_product(x, _weights(self.up).mT, counts)
        low = grouped_product(x, keys[self.mine].mT, counts)
        if self.gate is None:
            return grouped_product(low, self.up.base.mT, counts)
        gate = grouped_product(low, self.gate.base.mT, counts)
        return torch.cat([gate, grouped_product(x, self.up.base.mT, counts)], dim=-1)

    @torch.no_grad()
    def reset(self, std: float, ending_std: float) -> None:
        """Start again from N(0, std), the last projections from N(0, ending_std).

        What follows keys keeps their scale.
        """
        banks = {"up": self.up, "down": self.down, "gate": self.gate}
        for name, start in self._starts(std, ending_std):
            bank = banks[name]
            assert bank is not None
            bank.base.copy_(start)
            del start  # before the next one is drawn

    def _starts(self, std: float, ending_std: float) -> Iterator[tuple[str, Tensor]]:
        """Bases of this rank's banks, the same with and without keys where their shapes agree."""
        experts, hidden, width = self.num_experts, self.hidden, self.width
        up = normal_part((experts, first_rows(self.expert, hidden), width), std, self.part)
        if not self.key_rank:
            yield "up", up
        elif self.expert.is_gated:
            yield "up", up[:, hidden:]
        del up
        yield "down", normal_part((experts, hidden, width), ending_std, self.part)
        if self.key_rank:
            shape = experts, hidden, self.key_rank
            with torch.random.fork_rng(devices=[]), own_stream():
                low = normal_part(shape, self.key_rank**-0.5, self.part)
            yield "gate" if self.expert.is_gated else "up", low

    @torch.no_grad()
    def fold_(self, keys: Bank | None = None) -> None:
        """Merge maps and the bias into the experts, in place: for gates that sum to 1.

        Args:
            keys: their map, which is not folded yet, comes before the experts.
        """
        self.up, self.down = self.up.fold(), self.down.fold()
        if self.gate is not None and keys is not None:
            self.up = Bank(keys.map(self.up.base), transform="none")
            self.gate = self.gate.fold()
        if self.out_bias is not None:
            self.bias = nn.Parameter(self.out_bias.expand(len(self.down.base), -1).clone())
            self.out_bias = None


class FeedForward(nn.Module):
    """One network of the same kind as an expert, for every token.

    Args:
        width: channels of a token.
        hidden: channels inside.
        expert: kind of the network.
    """

    def __init__(self, width: int, hidden: int, *, expert: ExpertOptions = GELU) -> None:
        super().__init__()
        self.expert = expert
        self.up = nn.Linear(width, first_rows(expert, hidden), bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.reset(width**-0.5, hidden**-0.5)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.down(self.expert.activate(self.up(x)))

    @torch.no_grad()
    def reset(self, std: float, ending_std: float) -> None:
        """Start again from N(0, std), the last projection from N(0, ending_std)."""
        self.up.weight.normal_(std=std)
        self.down.weight.normal_(std=ending_std)


def first_rows(expert: ExpertOptions, hidden: int) -> int:
    """Rows of the first projection: gated kinds have two, stacked."""
    return 2 * hidden if expert.is_gated else hidden


def _weights(bank: Bank) -> Tensor:
    return bank.base if bank.shared else bank.map(bank.base)


def grouped_product(
    x: Float[Tensor, "rows inner"],
    weights: Float[Tensor, "groups inner outer"],
    counts: Int[Tensor, " groups"],
) -> Float[Tensor, "rows outer"]:
    """The first counts[0] rows times weights[0], the next counts[1] times weights[1], and so on.

    One fused call where its kernel takes the operands: bfloat16, on the CPU float32 as well, with
    rows that fill multiples of 16 bytes. A loop of products elsewhere.
    """
    weights = weights.to(x.dtype)
    # neither the CUDA kernel nor what torch.compile takes for the CPU's knows float32
    narrow = x.is_cuda or torch.compiler.is_compiling()
    fused = (torch.bfloat16,) if narrow else (torch.bfloat16, torch.float32)
    aligned = all(size * x.element_size() % 16 == 0 for size in weights.shape[1:])
    if x.dtype in fused and aligned:
        return F.grouped_mm(x, weights, offs=counts.cumsum(0).to(torch.int32))
    # unbind, because the backward of weights[i] in a loop writes every group's gradient each time
    parts = zip(x.split(counts.tolist()), weights.unbind(0), strict=True)
    return torch.cat([rows @ weight for rows, weight in parts])
