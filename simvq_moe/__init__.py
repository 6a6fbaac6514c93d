"""One shared linear map for codebooks and experts: SimVQ (arXiv:2411.02038) and MoE layers."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simvq_moe.core.usage import usage
    from simvq_moe.moe import MoE
    from simvq_moe.quantizers import EMAVQ, FSQ, LFQ, VQ, ResidualQuantizer, SimVQ

__version__ = "0.2.0"
__all__ = ["EMAVQ", "FSQ", "LFQ", "VQ", "MoE", "ResidualQuantizer", "SimVQ", "usage"]

_HOMES = {"usage": "simvq_moe.core.usage", "MoE": "simvq_moe.moe"}
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
