"""Quantizers: what they share, and a kind a file in `kinds`; all have the contract of
`AnyQuantizer`. Nothing here knows what is trained, or writes files.
"""

from simvq_moe.quantizers.base import PADDING, AnyQuantizer, Quantized
from simvq_moe.quantizers.codebook import Quantizer, SoftAssignment
from simvq_moe.quantizers.composed import GroupedQuantizer, Projected, ResidualQuantizer
from simvq_moe.quantizers.kinds.bsq import BSQ
from simvq_moe.quantizers.kinds.cosine import CosineVQ
from simvq_moe.quantizers.kinds.ema import EMAVQ
from simvq_moe.quantizers.kinds.fsq import FSQ
from simvq_moe.quantizers.kinds.group import GroupVQ
from simvq_moe.quantizers.kinds.ibq import IBQ
from simvq_moe.quantizers.kinds.lfq import LFQ
from simvq_moe.quantizers.kinds.mlp import MLPVQ
from simvq_moe.quantizers.kinds.ns_vq import NSVQ
from simvq_moe.quantizers.kinds.running_map import RunningMapVQ
from simvq_moe.quantizers.kinds.simvq import SimVQ
from simvq_moe.quantizers.kinds.vq import VQ
from simvq_moe.quantizers.options import CodebookOptions, LearnedOptions, LevelOptions

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
