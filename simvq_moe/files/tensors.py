"""Tensors out of files that may be anybody's: nothing in them is run, and garbage is one line."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from simvq_moe.files.regular import BrokenFileError, open_regular

NO_CHECKPOINT = (
    *(pickle.UnpicklingError, EOFError, LookupError, RuntimeError, TypeError, ValueError),
    *(AttributeError, ImportError, ArithmeticError, AssertionError, MemoryError, struct.error),
)
"""What torch.load raises for bytes that are no checkpoint, beside errors of the system."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the CPU.

    Raises:
        BrokenFileError: it is no such file.
    """
    open_regular(path).close()
    try:
        return load_file(path)
    except (SafetensorError, OSError, *NO_CHECKPOINT) as error:
        raise BrokenFileError(path, f"holds no tensors that can be read: {error}") from None


def read_checkpoint(path: Path) -> Any:
    """What torch.save wrote, of tensors, numbers, strings and containers of them, on the CPU.

    Raises:
        BrokenFileError: it is no such file, or holds other objects, which are not made.
    """
    open_regular(path).close()
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its words advise to run what the file says
        raise BrokenFileError(
            path, "holds something else than tensors and plain values, or is damaged"
        ) from None
    except (OSError, *NO_CHECKPOINT) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BrokenFileError(path, f"is no checkpoint of torch: {reason}") from None
