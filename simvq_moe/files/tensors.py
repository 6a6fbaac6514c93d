"""Tensors in files, read and written one at a time. Files may be anybody's: nothing in them is run,
and garbage is one line.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simvq_moe.files.regular import BrokenFileError, open_regular

T = TypeVar("T")

NO_CHECKPOINT = (
    *(pickle.UnpicklingError, EOFError, LookupError, RuntimeError, TypeError, ValueError),
    *(AttributeError, ImportError, ArithmeticError, AssertionError, MemoryError, struct.error),
)
"""What torch.load raises for bytes that are no checkpoint, beside errors of the system."""
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""Types by their names in safetensors, whose files begin with the last of these."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Form(NamedTuple):
    """A tensor without its elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class StoredWeights(Mapping[str, Tensor]):
    """A model's weights by name, on the CPU: each is read where it is asked for, and not kept.

    Args:
        forms: of all of them.
        read: reads one.
    """

    def __init__(self, forms: Mapping[str, Form], read: Callable[[str], Tensor]) -> None:
        self.forms, self.read = forms, read
        self._digest: str | None = None

    def __getitem__(self, name: str) -> Tensor:
        self.forms[name]  # raises KeyError
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)

    def __contains__(self, name: object) -> bool:
        return name in self.forms

    def digest(self) -> str:
        """See `weights_sha256`; the first time, everything is read."""
        if self._digest is None:
            self._digest = weights_sha256(self)
        return self._digest


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of every weight's name, type, shape and bytes, in whatever files they lie."""
    digest = hashlib.sha256()

    def add(name: str, tensor: Tensor) -> None:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor))

    for name in sorted(weights):
        add(name, weights[name])  # which is gone before the next one is read
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's elements, of a contiguous one on the CPU where they lie."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def read_safetensors(path: Path) -> StoredWeights:
    """The tensors of a safetensors file by name.

    Raises:
        BrokenFileError: it is no such file, here or where a tensor is asked for.
    """
    open_regular(path).close()

    def said(work: Callable[[], T]) -> T:
        try:
            return work()
        except (SafetensorError, OSError, *NO_CHECKPOINT) as error:
            reason = f"holds no tensors that can be read: {error}"
            raise BrokenFileError(path, reason) from None

    file: Any = said(lambda: safe_open(path, "pt"))
    names = list(file.keys())
    forms = said(lambda: {name: _form(file.get_slice(name)) for name in names})
    return StoredWeights(forms, lambda name: said(lambda: file.get_tensor(name)))


def _form(described: Any) -> Form:
    return Form(DTYPES[described.get_dtype()], tuple(described.get_shape()))


def forms_of(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
    """The form of each."""
    return {name: Form(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None
) -> None:
    """Write the file that safetensors writes, asking for one tensor at a time.

    Args:
        notes: what its header says of it, beside the tensors.
    """
    forms = tensors.forms if isinstance(tensors, StoredWeights) else forms_of(tensors)
    rank = {dtype: -place for place, dtype in enumerate(DTYPES.values())}
    order = sorted(forms, key=lambda name: (rank[forms[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(notes)} if notes else {}
    end = 0
    for name in order:
        dtype, shape = forms[name]
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    with path.open("wb") as file:
        file.write(framed_header(header))
        for name in order:
            file.write(bytes_of(tensors[name]))


def framed_header(header: Mapping[str, Any]) -> bytes:
    """How a safetensors file begins."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


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
