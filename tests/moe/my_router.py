"""A plug-in: a router that compares directions alone. `plugins: [my_router.py]`"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from simvq_moe.config.ranges import Weight
from simvq_moe.config.registry import register
from simvq_moe.moe.routers.rows import RowOptions, RowRouter


class DirectionRouter(RowRouter):
    """Logits s cos(x, r_i)."""

    options: DirectionOptions

    def score(
        self, x: Float[Tensor, "tokens width"], token_ids: Int[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens experts"]:
        del token_ids
        rows = F.normalize(self.bank.rows(x.dtype), dim=-1)
        return self.options.sharpness * F.normalize(x, dim=-1) @ rows.T


@register
@dataclass(frozen=True)
class DirectionOptions(RowOptions):
    """The smallest angles between tokens and rows."""

    router = DirectionRouter
    kind: Literal["direction"] = "direction"
    sharpness: Weight = 4.0
    """Factor on the cosines."""
