"""The device of this process, and what devices can do at best."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Literal, NamedTuple

import torch


class Peak(NamedTuple):
    """Dense matrix products, 1e12 floating-point operations a second, accumulated in float32."""

    bf16: float
    fp32: float
    """Without TF32, as PyTorch multiplies by default."""


PEAKS = {
    "B200": Peak(2250, 75),
    "H200 NVL": Peak(835, 60),
    "H200": Peak(989, 67),
    "GH200": Peak(989, 67),
    "H100 NVL": Peak(835, 60),
    "H100 PCIe": Peak(756, 51),
    "H100": Peak(989, 67),
    "A100": Peak(312, 19.5),
    "L40S": Peak(362, 91.6),
    "A10": Peak(125, 31.2),
    "L4": Peak(121, 30.3),
}
"""By what `torch.cuda.get_device_name` holds, the first that fits: NVIDIA's data sheets, of which
figures with sparsity are halved."""


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt, as glibc's malloc.h numbers them."""


def this_device() -> torch.device:
    """Where a process on its own computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: large tensors would otherwise go back to the system at once,
    and the page faults of new ones take up to a tenth of a step on a CPU."""
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def peak_flops(device_name: str, dtype: Literal["fp32", "bf16", "fp16"]) -> float | None:
    """Floating-point operations a second at best; None: not known."""
    words = device_name.replace("-", " ").split()
    for name, peak in PEAKS.items():
        if set(name.split()) <= set(words):
            return 1e12 * (peak.fp32 if dtype == "fp32" else peak.bf16)
    return None


def device_peak(device: torch.device, dtype: Literal["fp32", "bf16", "fp16"]) -> float | None:
    """`peak_flops` of this device; of a CPU it is not known."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), dtype)
