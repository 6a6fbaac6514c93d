"""Mixture-of-experts layers whose router, expert inputs and expert outputs may share a map."""

from simvq_moe.moe.layer import MoE

__all__ = ["MoE"]
