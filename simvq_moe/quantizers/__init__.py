"""Quantizers: a kind a file, its class, its options and what it refuses; all have the contract of
`AnyQuantizer`. Nothing here knows what is trained, or writes files.
"""

from simvq_moe.quantizers.base import (
    PADDING,
    AnyQuantizer,
    Quantized,
    Quantizer,
    SoftAssignment,
)
from simvq_moe.quantizers.bsq import BSQ
from simvq_moe.quantizers.composed import GroupedQuantizer, Projected, ResidualQuantizer
from simvq_moe.quantizers.cosine import CosineVQ
from simvq_moe.quantizers.ema import EMAVQ
from simvq_moe.quantizers.fsq import FSQ
from simvq_moe.quantizers.group import GroupVQ
from simvq_moe.quantizers.ibq import IBQ
from simvq_moe.quantizers.lfq import LFQ
from simvq_moe.quantizers.mlp import MLPVQ
from simvq_moe.quantizers.ns_vq import NSVQ
from simvq_moe.quantizers.options import CodebookOptions, LearnedOptions, LevelOptions
from simvq_moe.quantizers.running_map import RunningMapVQ
from simvq_moe.quantizers.simvq import SimVQ
from simvq_moe.quantizers.vq import VQ

__all__ = [
    "BSQ",
    "EMAVQ",
    "FSQ",
    "IBQ",
    "LFQ",
    "MLPVQ",
    "NSVQ",
    "PADDING",
    "VQ",
    "AnyQuantizer",
    "CodebookOptions",
    "CosineVQ",
    "GroupVQ",
    "GroupedQuantizer",
    "LearnedOptions",
    "LevelOptions",
    "Projected",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "RunningMapVQ",
    "SimVQ",
    "SoftAssignment",
]
