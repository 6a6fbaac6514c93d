"""Muon for the rows of routers, beside AdamW for all else (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon).

Its update is the momentum with all singular values near 1, so that no direction of a router's input
is learned faster than another: a control for whitening that input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Muon, Optimizer

from simvq_moe.engine.state import MOMENTS, first_state


class MuonOfRouters:
    """Takes gradients of the groups marked "muon" away from AdamW and steps them by torch's Muon.

    Updates have the root mean square of AdamW's (arXiv:2502.16982, eq. 4), so that one learning
    rate fits both. The momentum lies where AdamW would have its first moment, and checkpoints with
    it; the second moment stays 0.

    Args:
        optimizer: torch's AdamW over whole parameters.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.groups = [group for group in optimizer.param_groups if group.get("muon")]
        self.gradients: list[tuple[Tensor, Tensor | None]] = []
        if self.groups:
            optimizer.register_step_pre_hook(self._take)
            optimizer.register_step_post_hook(self._step)

    def _take(self, *_: Any) -> None:
        self.gradients = [(p, p.grad) for group in self.groups for p in group["params"]]
        for p, _gradient in self.gradients:
            p.grad = None

    @torch.no_grad()
    def _step(self, *_: Any) -> None:
        for p, gradient in self.gradients:
            p.grad = gradient
        for group in self.groups:
            muon = Muon(
                group["params"],
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                momentum=group["betas"][0],
                adjust_lr_fn="match_rms_adamw",
            )
            for p in group["params"]:
                state = self.optimizer.state[p]
                if not state:
                    state |= first_state(self.optimizer, p)
                state["step"] += 1
                muon.state[p]["momentum_buffer"] = state[MOMENTS[0]]
            muon.step()
