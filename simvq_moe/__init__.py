"""One shared linear map for codebooks and experts: SimVQ (arXiv:2411.02038) and MoE layers."""

from simvq_moe.core.usage import usage
from simvq_moe.moe import MoE
from simvq_moe.quantizers import EMAVQ, FSQ, LFQ, VQ, ResidualQuantizer, SimVQ

__version__ = "0.1.0"
__all__ = ["EMAVQ", "FSQ", "LFQ", "VQ", "MoE", "ResidualQuantizer", "SimVQ", "usage"]
