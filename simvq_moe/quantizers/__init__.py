"""Quantizers: one file a family, all with the contract of `AnyQuantizer` and `Quantized`."""

from simvq_moe.quantizers.base import PADDING, AnyQuantizer, Quantized, Quantizer
from simvq_moe.quantizers.simvq import SimVQ
from simvq_moe.quantizers.vq import EMAVQ, VQ, CosineVQ

__all__ = ["EMAVQ", "PADDING", "VQ", "AnyQuantizer", "CosineVQ", "Quantized", "Quantizer", "SimVQ"]
