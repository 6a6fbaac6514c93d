"""Restart of dead codes at random latents of the batch (Jukebox, arXiv:2005.00341, section 3.1).

Only a codebook whose rows are free can do it. Under a shared map a row does not move by itself,
and the codes of a grid follow from their ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from simvq_moe.core.collectives import sample

CALLS = 2
"""Collective calls of a restart: the sizes of the parts, and the latents."""


def restart_problems(restart: float, at: str = "") -> Iterator[str]:
    """A threshold that is not below the draws which a restarted code is given."""
    if not 0 <= restart < 1:
        yield f"{at}restart {restart}: choose 0 (never) or less than 1, the first count"


def restart_codes(
    rows: Float[Tensor, "codes width"],
    draws: Float[Tensor, " codes"],
    z: Float[Tensor, "tokens width"],
    *,
    idle: Bool[Tensor, " codes"],
    below: float,
    step: Int[Tensor, ""],
    parts: Sequence[int],
    origin: Float[Tensor, "codes width"] | None = None,
) -> None:
    """Set rows of dead codes to latents, in place, and their averages of draws to one.

    Every rank must call it, and with the same averages: then all draw the same latents from the
    joined batch. With fewer latents than dead codes the last ones wait.

    Args:
        rows: what is overwritten.
        draws: moving average of the draws of each code in a step, over all ranks.
        z: this rank's latents.
        idle: codes that nothing drew in this step. Others are alive again, and have a gradient.
        below: a code whose average is less than this is dead.
        step: number of the step, the seed of the draw.
        parts: latents of each forward pass, of which every rank had as many: the draw is that of
            one rank that saw the passes whole.
        origin: subtracted from the latents before they are written.
    """
    origin = None if origin is None else origin.detach()
    _restart(rows, draws, z, idle, below, step, list(parts), origin)


# an operator of its own, because it draws as many latents as there are dead codes: a compiler
# needs shapes that do not depend on data
@torch.library.custom_op(
    "simvq_moe::restart",
    mutates_args=("rows", "draws"),
    schema="(Tensor(a!) rows, Tensor(b!) draws, Tensor z, Tensor idle, float below, Tensor step, "
    "SymInt[] parts, Tensor? origin) -> ()",
)
def _restart(
    rows: Tensor,
    draws: Tensor,
    z: Tensor,
    idle: Tensor,
    below: float,
    step: Tensor,
    parts: list[int],
    origin: Tensor | None,
) -> None:
    dead = ((draws < below) & idle).nonzero().squeeze(1)
    latents = sample(z, len(dead), seed=int(step), parts=parts).to(rows.dtype)
    dead = dead[: len(latents)]
    rows[dead] = latents if origin is None else latents - origin[dead].to(rows.dtype)
    draws[dead] = 1


@_restart.register_fake
def _(*_: object) -> None:
    return None
