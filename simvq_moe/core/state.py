"""Tensors of a module that are no weights: constants, counts of this process, moving averages.

As plain buffers they would be lost in other hands: uninitialized where a module was built on the
meta device and given room, overwritten by rank 0's where DistributedDataParallel broadcasts
buffers, inference tensors where the module was built in inference mode, and rounded to a stop by
`model.bfloat16()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Make = Callable[[], Tensor]


class Stateful(nn.Module):
    """A module with tensors of its own (`hold`) and with averages (`register_average`)."""

    def hold(self, name: str, make: Make) -> None:
        """Set an attribute that moves with the module and keeps its dtype.

        It is no buffer: no state dict has it, and nothing broadcasts it. Where the module is given
        room after it was built on the meta device, it is made again.

        Args:
            make: its value at the start; module-level, or a partial of such, so that it pickles.
        """
        self._own("_held")[name] = make
        with torch.inference_mode(False):
            setattr(self, name, make())

    def register_average(self, name: str, start: Tensor, least: torch.dtype) -> None:
        """A buffer of the state dict that keeps at least this precision, whatever the weights have.

        Its steps are small: in a narrow dtype they would be rounded away.
        """
        self._own("_least")[name] = least
        self.register_buffer(name, start.to(torch.promote_types(start.dtype, least)))

    @property
    def held(self) -> list[Tensor]:
        """The tensors of `hold`."""
        return [getattr(self, name) for name in self._own("_held")]

    def _own(self, name: str) -> dict[str, Any]:
        return self.__dict__.setdefault(name, {})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers[name] for name in self._own("_least")}
        super()._apply(fn, recurse)
        for name, average in before.items():
            self._keep_precision(name, average)
        with torch.inference_mode(False):
            for name, make in self._own("_held").items():
                tensor = getattr(self, name)
                device = fn(tensor).device
                if device != tensor.device:
                    setattr(
                        self, name, _made(make, device) if tensor.is_meta else tensor.to(device)
                    )
        return self

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: Any, prefix: str, *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for name in self._own("_least"):
            self._keep_precision(name, self._buffers[name])
        for name, make in self._own("_held").items():
            if getattr(self, name).is_meta:
                setattr(self, name, _made(make, _device_of(self, state_dict)))

    def _keep_precision(self, name: str, before: Tensor | None) -> None:
        now, least = self._buffers[name], self._own("_least")[name]
        if before is not None and now is not None:
            wide = torch.promote_types(now.dtype, least)
            if wide != now.dtype:
                self._buffers[name] = before.to(now.device, wide)


def held_tensors(model: nn.Module) -> list[Tensor]:
    """What the modules of a model `hold`."""
    return [t for module in model.modules() if isinstance(module, Stateful) for t in module.held]


def _made(make: Make, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.device(device):
        return make()


def _device_of(module: nn.Module, state_dict: Any) -> torch.device:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    loaded = (value for value in state_dict.values() if isinstance(value, Tensor))
    devices = (t.device for t in (*own, *loaded) if not t.is_meta)
    return next(devices, torch.device("cpu"))
