"""Save and load whole modules: safetensors beside a config.json that rebuilds them.

The config holds the class name and the constructor's arguments, themselves plain values or modules
of this kind, and nothing executable: the class is looked up among those that are imported.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import snapshot_download
from safetensors.torch import load_model, save_model
from torch import nn

from simvq_moe.files import write_atomically, written_whole

CONFIG, WEIGHTS = "config.json", "model.safetensors"

Self = TypeVar("Self", bound="Pretrained")


class Pretrained(nn.Module):
    """A module that notes its constructor's arguments, so that a directory can rebuild it."""

    arguments: dict[str, Any]
    """The constructor's, by name; those that are defaults may be missing."""

    def __new__(cls: type[Self], *args: Any, **kwargs: Any) -> Self:
        module = object.__new__(cls)
        # bind_partial: copy and pickle call this without arguments and restore the state after
        bound = inspect.signature(cls.__init__).bind_partial(module, *args, **kwargs)
        arguments = dict(list(bound.arguments.items())[1:])
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        # past nn.Module's own __setattr__, which would register modules among the arguments
        module.__dict__["arguments"] = arguments
        return module

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors into the directory."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with written_whole(directory / WEIGHTS) as aside:
            save_model(self, str(aside))
        write_atomically(directory / CONFIG, json.dumps(_spec(self), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls: type[Self], source: str | Path) -> Self:
        """The module saved in a directory or in a Hugging Face repository of that name.

        Raises:
            ValueError: another class was saved there.
        """
        local = Path(source)
        directory = local if local.is_dir() else Path(snapshot_download(str(source)))
        module = _build(json.loads((directory / CONFIG).read_text()))
        if not isinstance(module, cls):
            name = type(module).__name__
            raise ValueError(f"{source} holds a {name}: use {name}.from_pretrained")
        load_model(module, str(directory / WEIGHTS))
        return module


def _spec(value: Any) -> Any:
    """Plain data for a constructor's argument."""
    if isinstance(value, Pretrained):
        arguments = {name: _spec(item) for name, item in value.__dict__["arguments"].items()}
        return {"class": type(value).__name__, "arguments": arguments}
    return [_spec(item) for item in value] if isinstance(value, list | tuple) else value


def _build(spec: Any) -> Any:
    if isinstance(spec, list):
        return [_build(item) for item in spec]
    if not isinstance(spec, dict) or "class" not in spec:
        return spec
    known = _subclasses(Pretrained)
    if spec["class"] not in known:
        raise ValueError(f"{CONFIG}: class {spec['class']!r} is none of {sorted(known)}")
    return known[spec["class"]](**{name: _build(v) for name, v in spec["arguments"].items()})


def _subclasses(cls: type[Pretrained]) -> dict[str, type[Pretrained]]:
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found |= _subclasses(child)
    return found
