"""The device of these tests."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "")
"""Empty: there is none, and nobody rehearses."""
on_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DEVICE, reason="needs a CUDA device, or DEVICE=cpu"),
]
