"""Binary spherical quantization: signs of latents on the unit sphere (BSQ, arXiv:2406.07548)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from simvq_moe.config.registry import register
from simvq_moe.quantizers.base import AnyQuantizer, refuse_behind_others
from simvq_moe.quantizers.kinds.cosine import to_sphere
from simvq_moe.quantizers.kinds.lfq import LFQ, LFQOptions
from simvq_moe.quantizers.options import level_problems


class BSQ(LFQ):
    """Binary spherical quantization: latents on the unit sphere, codes of +-1/sqrt(width).

    The arguments are those of `LFQ`. It is no residual level behind another, because its codes are
    all of length 1.
    """

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def join(self, levels: Sequence[AnyQuantizer], place: int) -> None:
        refuse_behind_others(self, levels, place)

    def prepare(self, z: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        return to_sphere(z)


@register
@dataclass(frozen=True)
class BSQOptions(LFQOptions):
    """The sign of each channel of a latent on the unit sphere (2406.07548)."""

    quantizer = BSQ
    kind: Literal["bsq"] = "bsq"  # pyright: ignore[reportIncompatibleVariableOverride]

    def problems(self, at: str, config: Any) -> Iterator[str]:
        yield from super().problems(at, config)
        yield from level_problems(at, self)
