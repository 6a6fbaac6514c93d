"""Every router as a loop over tokens and experts, written from the papers' formulas."""

from __future__ import annotations

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from simvq_moe import MoE
from simvq_moe.core.whitening import Whitening
from simvq_moe.moe.routers.cosine import CosineRouter
from simvq_moe.moe.routers.distance import DistanceRouter
from simvq_moe.moe.routers.expert_choice import ExpertChoiceRouter
from simvq_moe.moe.routers.hash import HashRouter
from simvq_moe.moe.routers.hyper import HyperRouter
from simvq_moe.moe.routers.noisy_topk import NoisyTopKRouter
from simvq_moe.moe.routers.rows import RowRouter
from simvq_moe.moe.routers.self_selecting import SelfSelectingRouter
from simvq_moe.moe.routers.topk import TopKRouter


def map_of(moe: MoE) -> Tensor:
    """The matrix A of a self-selecting layer's map on inputs."""
    assert moe.router.keys is not None
    eye = torch.eye(moe.width, dtype=torch.float64)
    return moe.router.keys.map(eye)


def score(moe: MoE, x: Tensor, noise: Tensor) -> Tensor:
    """Logits (experts,) of one token; noise (experts,) is what a noisy router drew for it."""
    router = moe.router
    if isinstance(router, HashRouter):
        return torch.zeros(moe.num_experts, dtype=x.dtype)
    if isinstance(router, SelfSelectingRouter):
        assert router.keys is not None
        keys = [key @ map_of(moe) for key in router.keys.base]
        return torch.stack([(key @ x).square().sum().sqrt() for key in keys])
    if isinstance(router, HyperRouter):
        hidden = F.relu(router.embedding @ router.A)
        rows = [hidden @ part for part in router.B.split(moe.width, dim=1)]
        logits = torch.stack([row @ x for row in rows])
        return logits if router.bias is None else logits + router.bias
    assert isinstance(router, RowRouter)
    rows = router.bank.rows()
    if isinstance(router, CosineRouter):
        h = router.projection @ x
        t = 0.3 * router.log_temperature[0].exp()
        return torch.stack([h @ row / (h.norm() * row.norm()) / t for row in rows])
    if isinstance(router, DistanceRouter):
        rows = rows.detach() if router.by_codebook_alone else rows
        return torch.stack([-(x - row).square().sum() / len(x) ** 0.5 for row in rows])
    assert isinstance(router, TopKRouter)
    logits = torch.stack([row @ x for row in rows])
    if router.bias is not None:
        logits = logits + router.bias
    if isinstance(router, NoisyTopKRouter) and moe.training:
        biases = torch.zeros(len(noise)) if router.noise_bias is None else router.noise_bias
        pairs = zip(router.noise, biases, strict=True)
        widths = torch.stack([(1 + (row @ x + bias).exp()).log() for row, bias in pairs])
        return logits + noise * widths
    return logits


def choices(moe: MoE, logits: Tensor, token_ids: Tensor) -> list[list[int]]:
    """The chosen experts of every token, best first."""
    tokens, experts = logits.shape
    if isinstance(moe.router, HashRouter):
        return [moe.router.table[i].tolist() for i in token_ids]
    if isinstance(moe.router, ExpertChoiceRouter):
        scores = logits.softmax(-1)
        takes = ceil(tokens * moe.top_k / experts)
        taken = [set(column.argsort(descending=True)[:takes].tolist()) for column in scores.T]
        of_token = [[e for e in range(experts) if t in taken[e]] for t in range(tokens)]
        return [sorted(es, key=lambda e: -float(scores[t, e])) for t, es in enumerate(of_token)]
    bias = 0 if moe.router.selection is None else moe.router.selection.bias.double()
    biased = (logits.sigmoid() if moe.router.gates == "sigmoid" else logits.softmax(-1)) + bias
    compared = logits if moe.router.selection is None else biased
    return [row.argsort(descending=True)[: moe.top_k].tolist() for row in compared]


def gates(moe: MoE, logits: Tensor, chosen: list[int]) -> Tensor:
    """Weights of the chosen experts of one token."""
    if moe.router.gates == "softmax_topk":
        return logits.exp()[chosen] / logits.exp().sum()
    if moe.router.gates == "sigmoid":
        sigmoids = 1 / (1 + (-logits[chosen]).exp())
        return sigmoids / sigmoids.sum()
    return logits[chosen].exp() / logits[chosen].exp().sum()


def expert(moe: MoE, e: int, x: Tensor) -> Tensor:
    """Output of one expert for one token, without a map after it."""
    experts, keys = moe.experts, moe.router.keys
    up = experts.up.rows()[e]
    if keys is None:
        first = up @ x
    else:
        key = keys.base[e] @ map_of(moe)
        low = up if experts.gate is None else experts.gate.base[e]
        first = low @ (key @ x)
        if experts.gate is not None:
            first = torch.cat([first, up @ map_of(moe) @ x])
    if experts.expert.kind == "gelu":
        hidden = F.gelu(first)
    else:
        half = len(first) // 2
        hidden = first[:half] * first[:half].sigmoid() * first[half:]
    return hidden @ experts.down.rows()[e]


def run(
    moe: MoE, x: Tensor, token_ids: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, list[list[int]], dict[str, Tensor]]:
    """Outputs, logits, choices and the router's own losses for tokens (tokens, width)."""
    centre = moe.router.centre
    seen = x if centre is None else x - centre.mean
    if isinstance(centre, Whitening):  # the input is mapped, not the rows
        seen = torch.stack([centre.turn(torch.eye(moe.width).double()) @ token for token in seen])
    logits = torch.stack([score(moe, *pair) for pair in zip(seen, noise, strict=True)])
    chosen = choices(moe, logits.detach(), token_ids)
    outputs = []
    for t, experts in enumerate(chosen):
        y = torch.zeros_like(x[t])
        for gate, e in zip(gates(moe, logits[t], experts), experts, strict=True):
            y = y + gate * expert(moe, e, x[t])
        outputs.append(y)
    losses = {}
    if isinstance(moe.router, DistanceRouter):
        rows = moe.router.bank.rows()
        pairs = [(seen[t], rows[e]) for t, experts in enumerate(chosen) for e in experts]
        losses["router_codebook"] = sum((r - x.detach()).square().mean() for x, r in pairs)
        losses["router_commitment"] = sum((x - r.detach()).square().mean() for x, r in pairs)
        losses = {name: torch.as_tensor(loss) / len(pairs) for name, loss in losses.items()}
    return torch.stack(outputs), logits, chosen, losses
