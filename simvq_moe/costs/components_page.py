"""docs/components.md, which is the registry as a page: python -m simvq_moe.costs.components_page.

Each kind of each family: what it is, its options with defaults and bounds, and what it costs, which
is counted here on the class that it builds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, replace
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch

from simvq_moe.config.docs import class_doc, field_docs
from simvq_moe.config.moe import (
    BalanceOptions,
    ExpertOptions,
    MapOptions,
    MoEConfig,
    RouterOptions,
    WhiteningOptions,
)
from simvq_moe.config.quantizer import QuantizerOptions
from simvq_moe.config.ranges import Range
from simvq_moe.config.registry import Options, is_family, kinds
from simvq_moe.costs.activations import counting
from simvq_moe.moe.products import products_of_map
from simvq_moe.text_table import markdown

HEAD = """# Components

The kinds that a config can name, with their options. Written from the registry and the docstrings
by `python -m simvq_moe.costs.components_page > docs/components.md`; plug-ins add their own kinds.

An option is set beside its kind: `--moe.router.kind cosine --moe.router.projection 32`, in YAML
`moe: {router: {kind: cosine, projection: 32}}`. Numbers like 2110.04627 are those of arXiv.
"""
WIDTH, EXPERTS, TOP_K, TOKENS = 64, 64, 4, 4096
"""Sizes of the layer and the batch whose costs are counted; quantizers have their defaults."""
COSTS = """learned: numbers that an optimizer changes; FLOPs: of a token, forward and backward;
added up: numbers that ranks add up in a step beside gradients. They are"""


class Room(NamedTuple):
    """A family on the page."""

    keys: Sequence[str]
    """Where a config has it."""
    family: type[Options]
    of_costs: str = ""
    """What the costs are counted for."""
    costs: Callable[[Any], dict[str, int | float]] | None = None


def of_quantizer(options: type[QuantizerOptions]) -> dict[str, int | float]:
    quantizer = options.example().build().eval()
    with counting() as counter:
        out = quantizer(torch.randn(TOKENS, quantizer.width, requires_grad=True))
        (out.z_q.sum() + out.loss).backward()
    found = _costs(quantizer, counter.get_total_flops() / TOKENS)
    return found | {"added up": quantizer.summed_numbers}


def of_router(options: type[RouterOptions]) -> dict[str, int | float]:
    layer = MoEConfig(experts=EXPERTS, top_k=TOP_K, router=options())
    router = options().build(WIDTH, replace(layer, gates=layer.convention), 1024)
    return _costs(router, sum(product.flops for product in router.products(TOKENS)))


def of_map(options: type[MapOptions]) -> dict[str, int | float]:
    bank = options(train_base=False).bank(torch.zeros(EXPERTS, WIDTH, WIDTH))
    rows = 1.0 if bank.shared else EXPERTS * WIDTH / TOKENS
    return _costs(bank, sum(product.flops for product in products_of_map(bank, rows)))


def _costs(module: torch.nn.Module, flops: int | float) -> dict[str, int | float]:
    return {"learned": sum(p.numel() for p in module.parameters()), "FLOPs": flops}


LAYER = f"at width {WIDTH}, {EXPERTS} experts, {TOP_K} of them for a token"
ROOMS = {
    "Quantizers": Room(
        ("quantizer",),
        QuantizerOptions,
        "at their defaults; `fsq`, `lfq` and `bsq` with 512 codes, `group_vq` with 4 groups",
        of_quantizer,
    ),
    "Routers": Room(("moe.router",), RouterOptions, LAYER, of_router),
    "Maps": Room(
        ("moe.router.map", "moe.expert_in_map", "moe.expert_out_map"),
        MapOptions,
        f"of a map after {EXPERTS} experts of width {WIDTH}, without their own rows",
        of_map,
    ),
    "Whitening": Room(("moe.router.whiten",), WhiteningOptions),
    "Balance": Room(("moe.balance",), BalanceOptions),
    "Experts": Room(("moe.expert",), ExpertOptions),
}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, room in ROOMS.items():
        where = ", ".join(f"`{key}`" for key in room.keys)
        parts.append(f"## {title}\n\n{where}: {class_doc(room.family)}\n")
        parts.append(_table(_kinds(room)))
        if room.costs is not None:
            parts.append(f"{COSTS} counted {room.of_costs}, in a batch of {TOKENS:,} tokens.\n")
        options = _options(room)
        parts += [_table(options)] if len(options) > 1 else []
    return "\n".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    return markdown([[cell.replace("|", "\\|") for cell in row] for row in rows]) + "\n"


def _kinds(room: Room) -> list[list[str]]:
    rows: list[list[str]] = []
    counted: dict[str, int | float] = {}
    for kind, options in sorted(kinds(room.family).items()):
        counted = room.costs(options) if room.costs else {}
        costs = [f"{round(number):,}" for number in counted.values()]
        rows.append([f"`{kind}`", class_doc(options), *costs])
    return [["kind", "what it is", *counted], *rows]


def _options(room: Room) -> list[list[str]]:
    """An option a row, with the kinds that have it in the same way."""
    rows: dict[tuple[str, ...], list[str]] = {}
    known = kinds(room.family)
    for kind, options in sorted(known.items()):
        docs, types = field_docs(options), get_type_hints(options, include_extras=True)
        for f in fields(options):
            if f.name != "kind":
                row = (f"`{f.name}`", _default(f), _values(types[f.name]), docs[f.name])
                rows.setdefault(row, []).append(f"`{kind}`")
    shown = [["option", "of", "default", "values", "what it does"]]
    for (name, *rest), having in sorted(rows.items(), key=lambda one: -len(one[1])):
        shown.append([name, "all" if len(having) == len(known) else ", ".join(having), *rest])
    return shown


def _default(f: Any) -> str:
    value = f.default_factory() if f.default is MISSING else f.default
    return f"`{value.kind if isinstance(value, Options) else value}`"


def _values(kind: Any) -> str:
    """What a field of this type may be."""
    if is_family(kind):
        return "a kind"
    if kind is bool:
        return "True or False"
    if get_origin(kind) is Literal:
        return ", ".join(f"`{one}`" for one in get_args(kind))
    if get_origin(kind) is Annotated:
        number, bounds = kind.__origin__, kind.__metadata__[0]
        assert isinstance(bounds, Range)
        what = "an integer" if number is int else "a number"
        return f"{what} from {_short(bounds.least)} to {_short(bounds.most)}"
    if get_origin(kind) is tuple:
        return f"a list; each {_values(get_args(kind)[0])}"
    inner = [one for one in get_args(kind) if one is not type(None)]
    return f"{_values(inner[0])}, or None"


def _short(number: int | float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


if __name__ == "__main__":
    print(page(), end="")
