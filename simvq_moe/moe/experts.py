"""The experts of a layer as two banks: stacked up- and down-projections, each with its map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.core.bank import Bank, Transform


class Experts(nn.Module):
    """MLPs E_i(x) = gelu(x U_i^T) D_i, with U_i and D_i of shape (hidden, width).

    A map on the inputs belongs to the rows of U (x A^T: `up.pull`), one on the outputs to the rows
    of D (`down.map`). Both are linear, so the layer applies them once a token, outside the
    experts, and `forward` here leaves them out.

    Args:
        width: channels of a token.
        hidden: channels inside an expert.
        experts: number of experts.
        in_map, out_map: shared map of the up- and of the down-projections.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        *,
        in_map: Transform = "none",
        out_map: Transform = "none",
    ) -> None:
        super().__init__()
        self.up = Bank(torch.randn(experts, hidden, width) / width**0.5, transform=in_map)
        self.down = Bank(torch.randn(experts, hidden, width) / hidden**0.5, transform=out_map)

    def forward(
        self, x: Float[Tensor, "assignments width"], counts: Int[Tensor, " experts"]
    ) -> Float[Tensor, "assignments width"]:
        """Outputs before the shared map of rows sorted by expert, counts[i] rows for expert i."""
        hidden = F.gelu(grouped_product(x, self.up.base.mT, counts))
        return grouped_product(hidden, self.down.base, counts)


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
    fused = (torch.bfloat16,) if x.is_cuda else (torch.bfloat16, torch.float32)
    aligned = all(size * x.element_size() % 16 == 0 for size in weights.shape[1:])
    if x.dtype in fused and aligned:
        return F.grouped_mm(x, weights, offs=counts.cumsum(0).to(torch.int32))
    # unbind, for the backward of weights[i] in a loop writes every group's gradient each time
    parts = zip(x.split(counts.tolist()), weights.unbind(0), strict=True)
    return torch.cat([rows @ weight for rows, weight in parts])
