"""Quantizers: one file a family, all with the contract of `AnyQuantizer` and `Quantized`."""

from simvq_moe.quantizers.base import (
    PADDING,
    AnyQuantizer,
    Quantized,
    Quantizer,
    SoftAssignment,
)
from simvq_moe.quantizers.composed import GroupedQuantizer, Projected, ResidualQuantizer
from simvq_moe.quantizers.mapped import IBQ, MLPVQ, GroupVQ
from simvq_moe.quantizers.scalar import BSQ, FSQ, LFQ
from simvq_moe.quantizers.simvq import SimVQ
from simvq_moe.quantizers.vq import EMAVQ, VQ, CosineVQ

__all__ = [
    "BSQ",
    "EMAVQ",
    "FSQ",
    "IBQ",
    "LFQ",
    "MLPVQ",
    "PADDING",
    "VQ",
    "AnyQuantizer",
    "CosineVQ",
    "GroupVQ",
    "GroupedQuantizer",
    "Projected",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "SimVQ",
    "SoftAssignment",
]
