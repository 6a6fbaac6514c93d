"""One shared linear map for codebooks and experts: SimVQ (arXiv:2411.02038) and MoE layers."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simvq_moe.core.usage import counting, usage
    from simvq_moe.integrations.meters import meter, usage_by_layer
    from simvq_moe.moe import MoE
    from simvq_moe.quantizers import EMAVQ, FSQ, LFQ, VQ, ResidualQuantizer, SimVQ

__version__ = "0.2.0"
__all__ = [
    "EMAVQ",
    "FSQ",
    "LFQ",
    "VQ",
    "MoE",
    "ResidualQuantizer",
    "SimVQ",
    "counting",
    "meter",
    "usage",
    "usage_by_layer",
]

_HOMES = {
    "MoE": "simvq_moe.moe",
    "counting": "simvq_moe.core.usage",
    "meter": "simvq_moe.integrations.meters",
    "usage": "simvq_moe.core.usage",
    "usage_by_layer": "simvq_moe.integrations.meters",
}
"""Where a name is defined, unless it is a quantizer."""


def __getattr__(name: str) -> Any:
    """A public name, whose module is imported with torch when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES.get(name, "simvq_moe.quantizers")), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
