"""float32 matrix products in float32, whatever the process allows elsewhere (TF32, bfloat16).

PyTorch has two sets of switches for it: `set_float32_matmul_precision` with the older `allow_tf32`,
and since 2.9 `fp32_precision` at three levels (all, a backend, an operation), where "none" takes
what the level above says. Reading the old one raises where the two disagree, which is what the use
of the new one leads to; so both are set, and both are put back as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

LEVELS = (
    ("generic", "all"),
    ("cuda", "all"),
    ("mkldnn", "all"),
    ("cuda", "matmul"),
    ("mkldnn", "matmul"),
)
"""New switches that decide about matrix products, outer ones first."""
AGREEING = (("highest", "ieee", "ieee"), ("high", "tf32", "tf32"), ("medium", "tf32", "bf16"))
"""Values of the old switch, and of the new ones for CUDA and oneDNN that it agrees with."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices are IEEE float32 inside."""
    own = _own_values()
    allowed = _old_value()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        # sets the new switches of both operations as well
        torch.set_float32_matmul_precision(allowed)
        for level, value in own.items():
            _set(level, value)


def _own_values() -> dict[tuple[str, str], str]:
    """What each new switch itself says: all are "none" afterwards, so that none hides another."""
    own: dict[tuple[str, str], str] = {}
    for level in LEVELS:
        own[level] = torch._C._get_fp32_precision_getter(*level)
        _set(level, "none")
    return own


def _old_value() -> str:
    """The old switch, which can be read only where the new ones agree with it."""
    for value, cuda, mkldnn in AGREEING:
        _set(("cuda", "matmul"), cuda)
        _set(("mkldnn", "matmul"), mkldnn)
        with suppress(RuntimeError):
            if torch.get_float32_matmul_precision() == value:
                return value
    return "highest"


def _set(level: tuple[str, str], value: str) -> None:
    torch._C._set_fp32_precision_setter(*level, value)
