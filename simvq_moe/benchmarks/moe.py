"""Forward and backward of MoE layers side by side, in one process, against a dense network.

The limit, 1.00, is a dense network of the same kind with as many FLOPs a token as the chosen
experts have: a layer cannot do better than route and sort for nothing. Everyone gets the same
tokens, the same weights where the kind of expert is the same, and, by construction of tokens and
router rows, the same assignments: even ones, or with half of the tokens on expert 0.

Where all gradients of a projection take 32 MiB or more, glibc maps their pages anew in every step.
That is a good part of what many experts cost on a CPU, and in a process started with
MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=4000000000 it is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.benchmarks.timing import Step, best_of_rounds, installed
from simvq_moe.config.moe import ExpertOptions
from simvq_moe.config.registry import as_options
from simvq_moe.errors import ConfigError
from simvq_moe.moe import MoE
from simvq_moe.moe.experts import FeedForward
from simvq_moe.text_table import markdown

Load = Literal["even", "skewed"]
Dtype = Literal["float32", "bfloat16"]
LIMITS: dict[str, str] = {"gelu": "dense GELU network", "swiglu": "dense SwiGLU network"}
MARGIN = 16.0
"""Logit of a token's experts above the noise of all logits, whose deviation is 1."""
MAX_PADDED_GIB = 8.0
"""Above this much in its padded activations DeepSpeed's layer without drops is left out."""


@dataclass(frozen=True)
class MoECase:
    """Sizes of one comparison."""

    width: int = 256
    """Channels of a token."""
    hidden: int = 512
    """Channels inside an expert."""
    experts: int = 16
    """Number of experts."""
    top_k: int = 2
    """Experts of a token."""
    tokens: int = 4096
    """Tokens of a step."""
    dtype: Dtype = "float32"
    """Precision of tokens, weights and products; the router computes in float32 in any case."""
    load: Load = "even"
    """"even", or "skewed": half of the tokens choose expert 0."""


QUICK = {"experts": (16, 64), "load": get_args(Load), "dtype": get_args(Dtype)}
FULL = {**QUICK, "width": (256, 512), "experts": (8, 64, 256), "top_k": (2, 8)}


@dataclass(frozen=True)
class MeasuredMoE:
    """One contestant at one size."""

    case: MoECase
    name: str
    limit: str
    """The dense network that it is compared with."""
    seconds: float
    """CPU seconds of the best round, forward and backward."""
    relative: float
    """Times the limit."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def moe_cases(preset: dict[str, tuple[Any, ...]], **chosen: tuple[Any, ...]) -> list[MoECase]:
    """Every combination of a preset's values, some of them replaced by those chosen."""
    values = {**preset, **{name: given for name, given in chosen.items() if given}}
    return [MoECase(**dict(zip(values, row, strict=True))) for row in product(*values.values())]


def bench_moe(
    cases: list[MoECase], *, rounds: int = 5, device: Literal["cpu", "cuda"] = "cpu"
) -> list[MeasuredMoE]:
    """Measure every contestant that is installed at every size, on one thread.

    Raises:
        ConfigError: a case's experts, top_k and width do not go together.
    """
    for case in cases:
        _check(case)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [result for case in cases for result in _measure(case, rounds, device)]
    finally:
        torch.set_num_threads(threads)


def moe_table(results: list[MeasuredMoE]) -> str:
    """A Markdown table for each width, hidden, top_k, tokens and dtype: ratios to the limit."""
    groups: dict[MoECase, list[MeasuredMoE]] = {}
    for r in results:
        groups.setdefault(replace(r.case, experts=0, load="even"), []).append(r)
    return "\n\n".join(_one_table(shape, members) for shape, members in groups.items())


def assignments(
    case: MoECase, device: str = "cpu"
) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, "experts width"], Int[Tensor, "tokens k"]]:
    """Tokens and orthonormal router rows, and the experts that a top-k router gives them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(case.tokens, case.top_k, dtype=torch.int64)
    free = torch.ones(case.tokens, case.top_k, dtype=torch.bool)
    first = 1 if case.load == "skewed" else 0
    free[: first * case.tokens // 2, 0] = False  # these stay with expert 0
    ids[free] = first + torch.arange(int(free.sum())) % (case.experts - first)
    ids = ids[torch.randperm(case.tokens, generator=generator)]
    rows = torch.randn(case.width, case.experts, generator=generator)
    rows = torch.linalg.qr(rows).Q.T
    noise = torch.randn(case.tokens, case.width, generator=generator)
    x = noise + MARGIN * rows[ids].sum(1)
    dtype = getattr(torch, case.dtype)
    return x.to(device, dtype), rows.to(device, dtype), ids.to(device)


def layers(
    case: MoECase, rows: Float[Tensor, "experts width"]
) -> dict[str, tuple[str, Callable[[Tensor], Tensor], nn.Module]]:
    """Contestants by name: kind of expert, what to call on tokens, and its parameters."""
    torch.manual_seed(0)
    sizes = (case.width, case.hidden, case.experts, case.top_k)
    found: dict[str, tuple[str, Any, nn.Module]] = {}
    for kind in LIMITS:
        expert = as_options(ExpertOptions, kind, "expert")
        dense = FeedForward(case.width, case.top_k * case.hidden, expert=expert)
        ours = _routed(MoE(*sizes, expert=kind), rows)
        found[LIMITS[kind]] = (kind, dense, dense)
        found[f"simvq-moe, {kind}"] = (kind, ours, ours)
    plain: Any = found["simvq-moe, gelu"][2]
    uncounted = _like(plain, MoE(*sizes)).eval()  # which changes nothing else
    mapped = _like(plain, MoE(*sizes, expert_out_map="linear"))
    folded = mapped.fold()
    found["simvq-moe, usage counting off"] = ("gelu", uncounted, uncounted)
    found["simvq-moe, shared map"] = ("gelu", mapped, mapped)
    found["simvq-moe, shared map folded"] = ("gelu", folded, folded)
    for capacity, name in ((0.0, "DeepSpeed, no drops"), (1.0, "DeepSpeed, capacity 1.0")):
        if capacity or _padded_gib(case) <= MAX_PADDED_GIB:
            peer: Any = _deepspeed(plain, capacity)
            found[name] = ("gelu", lambda x, peer=peer: peer(x)[0], peer)
        else:
            print(f"{name} left out: {_padded_gib(case):.0f} GiB of padding", file=sys.stderr)
    if installed("transformers"):
        gated: Any = found["simvq-moe, swiglu"][2]
        block: Any = _mixtral(gated)
        found["transformers Mixtral block"] = ("swiglu", lambda x: block(x[None])[0], block)
    for _, _, module in found.values():
        module.to(rows.device, rows.dtype)
    return found


def _check(case: MoECase) -> None:
    for name in ("width", "hidden", "experts", "top_k", "tokens"):
        if getattr(case, name) < 1:
            raise ConfigError(f"{name} {getattr(case, name)}: --{name} takes at least 1")
    others = case.experts - (case.load == "skewed")
    if case.top_k > others:
        raise ConfigError(
            f"top_k {case.top_k} > {others}, the experts of {case.load} tokens beside expert 0: "
            "lower --top-k or raise --experts"
        )
    if case.experts > case.width:
        raise ConfigError(
            f"experts {case.experts} > width {case.width}: the routing is by orthogonal router "
            "rows: lower --experts or raise --width"
        )


def _measure(case: MoECase, rounds: int, device: str) -> list[MeasuredMoE]:
    print(f"measuring {case}", file=sys.stderr)
    x, rows, _ = assignments(case, device)
    contestants = layers(case, rows)
    steps = {name: _step(call, module, x) for name, (_, call, module) in contestants.items()}
    best = best_of_rounds(steps, rounds, device)
    limits = {name: LIMITS[kind] for name, (kind, _, _) in contestants.items()}
    return [
        MeasuredMoE(case, name, limits[name], best[name], best[name] / best[limits[name]])
        for name in steps
    ]


def _step(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Step:
    direction = torch.randn_like(x)

    def step() -> None:
        call(x.detach().requires_grad_()).backward(direction)
        module.zero_grad()

    return step


def _routed(layer: MoE, rows: Tensor) -> MoE:
    router: Any = layer.router
    with torch.no_grad():
        router.bank.base.copy_(rows)
    return layer


def _like(layer: MoE, other: MoE) -> MoE:
    """The other layer with this one's weights; a map of its own stays the identity."""
    other.load_state_dict(layer.state_dict(), strict=False)
    return other


@torch.no_grad()
def _deepspeed(layer: MoE, capacity_factor: float) -> nn.Module:
    from simvq_moe.engine.settings import import_deepspeed

    import_deepspeed()
    from simvq_moe.moe.deepspeed_baseline import DeepSpeedCapacityMoE

    width, hidden = layer.width, layer.experts.down.base.shape[1]
    peer = DeepSpeedCapacityMoE(
        width, hidden, layer.num_experts, layer.top_k, capacity_factor=capacity_factor
    )
    router: Any = layer.router
    peer.router_rows.copy_(router.bank.base)
    experts: Any = peer.inner.deepspeed_moe.experts
    for i, expert in enumerate(experts.deepspeed_experts):
        expert.up.weight.copy_(layer.experts.up.base[i])
        expert.down.weight.copy_(layer.experts.down.base[i].T)
    return peer.inner


@torch.no_grad()
def _mixtral(layer: MoE) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=layer.width,
        intermediate_size=layer.experts.down.base.shape[1],
        num_local_experts=layer.num_experts,
        num_experts_per_tok=layer.top_k,
        router_jitter_noise=0.0,
    )
    # what a model from_pretrained runs; without it each expert's gradient is as large as all
    config._experts_implementation = "grouped_mm"
    block: Any = MixtralSparseMoeBlock(config)
    router: Any = layer.router
    block.gate.weight.copy_(router.bank.base)
    block.experts.gate_up_proj.copy_(layer.experts.up.base)
    block.experts.down_proj.copy_(layer.experts.down.base.mT)
    return block


def _padded_gib(case: MoECase) -> float:
    """What the fullest expert's share of rows makes of all, four times: in, out, and twice
    hidden."""
    fullest = case.tokens // 2 if case.load == "skewed" else case.tokens * case.top_k / case.experts
    size = torch.finfo(getattr(torch, case.dtype)).bits / 8
    return case.experts * fullest * 2 * (case.width + case.hidden) * size / 2**30


def _one_table(shape: MoECase, results: list[MeasuredMoE]) -> str:
    columns = list(dict.fromkeys((r.case.experts, r.case.load) for r in results))
    ratios = {(r.name, (r.case.experts, r.case.load)): r for r in results}
    lines = [
        f"Width {shape.width}, hidden {shape.hidden}, top_k {shape.top_k}, {shape.tokens} tokens, "
        f"{shape.dtype}:",
        "",
    ]
    rows = [["times its dense network", *(f"{e} experts, {s}" for e, s in columns)]]
    for name in dict.fromkeys(r.name for r in results):
        cells = []
        for column in columns:
            r = ratios.get((name, column))
            if r is None:
                cells.append("")
            elif r.name == r.limit:
                cells.append(f"{1e3 * r.seconds:.0f} ms")
            else:
                cells.append(f"{r.relative:.2f}")
        rows.append([name, *cells])
    return "\n".join([*lines, markdown(rows, right=range(1, len(columns) + 1))])
