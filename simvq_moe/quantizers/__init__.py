"""Quantizers: one file a family, all with the contract of `Quantizer` and `Quantized`."""

from simvq_moe.quantizers.base import Quantized, Quantizer
from simvq_moe.quantizers.simvq import SimVQ
from simvq_moe.quantizers.vq import EMAVQ, VQ

__all__ = ["EMAVQ", "VQ", "Quantized", "Quantizer", "SimVQ"]
