"""The experts of a layer as two banks: stacked up- and down-projections, each with its map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
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
        self, x: Float[Tensor, "assignments width"], counts: list[int]
    ) -> Float[Tensor, "assignments width"]:
        """Outputs before the shared map of rows sorted by expert, counts[i] rows for expert i."""
        # unbind, for the backward of base[i] in a loop writes all experts' gradients each time
        ups, downs = self.up.base.unbind(0), self.down.base.unbind(0)
        parts = [
            F.gelu(rows @ up.T) @ down
            for rows, up, down in zip(x.split(counts), ups, downs, strict=True)
            if len(rows)
        ]
        return torch.cat(parts) if parts else x
