"""Forward and backward of quantizers side by side, in one process, against the bare product.

Everyone gets the same latents, the same codes and the same gradient of the output. Rounds are
interleaved, so that a busy machine slows all alike, and the best round counts. Time is CPU seconds
of the process (wall time on a GPU), memory the largest sum of live tensor allocations in a step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simvq_moe.benchmarks.timing import Step, best_of_rounds, installed, megabytes
from simvq_moe.quantizers import SimVQ
from simvq_moe.text_table import markdown

CASES = [(4096, 1024, 64), (4096, 8192, 128), (4096, 65536, 128), (1024, 262144, 128)]
"""Tokens, codes, width."""

PRODUCT = "fp32 product"
TILE = 1024


@dataclass(frozen=True)
class Measured:
    """One contestant at one size."""

    tokens: int
    codes: int
    width: int
    name: str
    seconds: float
    """CPU seconds of the best round, forward and backward."""
    relative: float
    """Times the bare float32 matrix product of latents and codes."""
    megabytes: float | None
    """Largest sum of live tensor allocations within a step; None: not measured."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_quantizer(
    cases: list[tuple[int, int, int]] | None = None, *, rounds: int = 3, device: str = "cpu"
) -> list[Measured]:
    """Measure every contestant that is installed at every size."""
    results: list[Measured] = []
    for tokens, codes, width in cases or CASES:
        print(f"measuring {tokens} tokens, {codes} codes, width {width}", file=sys.stderr)
        torch.manual_seed(0)
        z = torch.randn(tokens, width, device=device) / width**0.5
        q = torch.randn(codes, width, device=device) / width**0.5
        steps = {PRODUCT: _product(z, q), **_contestants(z, q)}
        best = best_of_rounds(steps, rounds, device)
        for name, step in steps.items():
            memory = None if "search" in name else megabytes(step, device)
            relative = best[name] / best[PRODUCT]
            results.append(Measured(tokens, codes, width, name, best[name], relative, memory))
    return results


def table(results: list[Measured]) -> str:
    """A Markdown table of the results."""
    rows = [["tokens, codes, width", "contestant", "seconds", "x product", "MB"]]
    for r in results:
        memory = "" if r.megabytes is None else f"{r.megabytes:.0f}"
        case = f"{r.tokens}, {r.codes}, {r.width}"
        rows.append([case, r.name, f"{r.seconds:.3f}", f"{r.relative:.2f}", memory])
    return markdown(rows, right=(2, 3, 4))


def _product(z: Tensor, q: Tensor) -> Step:
    def step() -> None:
        for start in range(0, len(q), TILE):
            _ = z @ q[start : start + TILE].T

    return step


def _contestants(z: Tensor, q: Tensor) -> dict[str, Step]:
    """Training steps on the same base rows; peers only where their packages are installed."""
    ours = SimVQ(len(q), q.shape[1]).to(z.device)
    ours.bank.base.copy_(q)
    steps: dict[str, Step] = {
        "simvq-moe SimVQ": _training_step(lambda x: ours(x)[:3:2], z),
        "plain published formula": _training_step(_PublishedFormula(q), z),
    }
    if peer := installed("vector_quantize_pytorch"):
        theirs = peer.SimVQ(dim=q.shape[1], codebook_size=len(q), rotation_trick=False)
        theirs.frozen_codebook.copy_(q)
        classic = peer.VectorQuantize(dim=q.shape[1], codebook_size=len(q))
        for name, module in [("SimVQ", theirs), ("VectorQuantize", classic)]:
            call = _peer_call(module.to(z.device))
            steps[f"vector-quantize-pytorch {name}"] = _training_step(call, z)
    if (faiss := installed("faiss")) and z.device.type == "cpu":
        index = faiss.IndexFlatL2(q.shape[1])
        index.add(q.numpy())
        steps["FAISS, search alone"] = lambda: index.search(z.numpy(), 1)
    if z.is_cuda and installed("triton"):
        steps |= _kernels(z, q)
    return steps


def _kernels(z: Tensor, q: Tensor) -> dict[str, Step]:
    """The two ways of our search on GPUs, of which the faster one is taken."""
    from simvq_moe.core.search.nearest_triton import best_codes
    from simvq_moe.core.search.screening_triton import best_screened

    half_norms, nothing = q.square().sum(1) / 2, z.new_full((len(z),), -torch.inf)
    return {
        "simvq-moe, search alone, float32": lambda: best_codes(z, q, half_norms),
        "simvq-moe, search alone, screened": lambda: best_screened(z, q, half_norms, nothing),
    }


class _PublishedFormula(torch.nn.Module):
    """SimVQ as its paper and code write it: the distance matrix, then argmin."""

    def __init__(self, q: Tensor) -> None:
        super().__init__()
        self.q = q
        self.W = torch.nn.Parameter(torch.eye(q.shape[1], device=q.device))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.q @ self.W
        square = z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z @ codes.T
        e = codes[square.argmin(1)]
        loss = F.mse_loss(e, z.detach()) + 0.25 * F.mse_loss(z, e.detach())
        return z + (e - z).detach(), loss


def _peer_call(module: torch.nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def call(z: Tensor) -> tuple[Tensor, Tensor]:
        z_q, _, loss = module(z[None])
        return z_q, loss

    return call


def _training_step(call: Callable[[Tensor], tuple[Any, ...]], z: Tensor) -> Step:
    from_decoder = torch.ones_like(z)

    def step() -> None:
        x = z.clone().requires_grad_()
        z_q, loss = call(x)
        torch.autograd.backward([z_q, loss.sum()], [from_decoder.view_as(z_q), None])

    return step
