"""Save and load whole modules: safetensors beside a config.json that rebuilds them.

The config holds the class name and the constructor's arguments, themselves plain values, options of
components or modules of this kind, and nothing executable: classes are looked up among those that
are imported, and kinds of options among those that are registered.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from simvq_moe.config.registry import Options, family_named, family_of, of_kind
from simvq_moe.files.regular import (
    BrokenFileError,
    parse_json,
    read_bytes,
    write_atomically,
    written_whole,
)
from simvq_moe.files.tensors import read_safetensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CONFIG_LIMIT = 2**20
"""Bytes of a config.json that are read at most."""
NOT_MADE = (
    *(ValueError, RuntimeError, TypeError, ArithmeticError, AssertionError, LookupError),
    *(AttributeError, MemoryError),
)
"""What constructors raise for arguments that go with no module."""

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
            ValueError: another class was saved there, or files that are broken.
        """
        local = Path(source)
        directory = local if local.is_dir() else _downloaded(str(source))
        spec = parse_json(read_bytes(directory / CONFIG, limit=CONFIG_LIMIT), directory / CONFIG)
        weights = read_safetensors(directory / WEIGHTS)
        with torch.device("meta"):  # described first, for its sizes may be anything
            described = _made(spec, directory)
        if not isinstance(described, cls):
            name = type(described).__name__
            raise ValueError(f"{source} holds a {name}: use {name}.from_pretrained")
        _check_sizes(described, weights, directory)
        module = _made(spec, directory)
        assert isinstance(module, cls)
        try:
            load_model(module, str(directory / WEIGHTS))
        except RuntimeError as error:
            raise BrokenFileError(directory / WEIGHTS, f"is not of {CONFIG}: {error}") from None
        return module


def _downloaded(repository: str) -> Path:
    from huggingface_hub import snapshot_download  # takes half as long to import as torch

    return Path(snapshot_download(repository))


def _check_sizes(module: nn.Module, weights: Mapping[str, Tensor], directory: Path) -> None:
    """Raise `BrokenFileError` unless the weights have the sizes of the module's tensors."""
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name, tensor in weights.items():
        if wanted.get(name) != tensor.shape:
            there = tuple(wanted[name]) if name in wanted else "no tensor"
            reason = f"has {name} of shape {tuple(tensor.shape)}, where {CONFIG} has {there}"
            raise BrokenFileError(directory / WEIGHTS, reason)
    # of tensors that share memory one is saved, so that no more can be missing than are there
    missing = sum(shape.numel() for name, shape in wanted.items() if name not in weights)
    if missing > sum(tensor.numel() for tensor in weights.values()):
        raise BrokenFileError(directory / WEIGHTS, f"lacks tensors of the module in {CONFIG}")


def _made(spec: Any, directory: Path) -> Any:
    try:
        return _build(spec)
    except NOT_MADE as error:
        raise BrokenFileError(directory / CONFIG, f"describes no module: {error}") from None


def _spec(value: Any) -> Any:
    """Plain data for a constructor's argument."""
    if isinstance(value, Pretrained):
        arguments = {name: _spec(item) for name, item in value.__dict__["arguments"].items()}
        return {"class": type(value).__name__, "arguments": arguments}
    if isinstance(value, Options):
        of = family_of(type(value))
        assert of is not None
        own = {f.name: _spec(getattr(value, f.name)) for f in fields(value)}
        return {"options": of.__name__, **own}
    return [_spec(item) for item in value] if isinstance(value, list | tuple) else value


def _build(spec: Any) -> Any:
    if isinstance(spec, list):
        return [_build(item) for item in spec]
    if isinstance(spec, dict) and "options" in spec:
        return _options(spec)
    if not isinstance(spec, dict) or "class" not in spec:
        return spec
    known = _subclasses(Pretrained)
    if not isinstance(spec["class"], str) or spec["class"] not in known:
        raise ValueError(f"{CONFIG}: class {spec['class']!r} is none of {sorted(known)}")
    if not isinstance(spec.get("arguments"), dict):
        raise ValueError(f"{CONFIG}: class {spec['class']!r} has no arguments")
    return known[spec["class"]](**{name: _build(v) for name, v in spec["arguments"].items()})


def _options(spec: dict[str, Any]) -> Options:
    """The options of a component: its family and kind by name, and the values of its fields."""
    own = {name: _build(value) for name, value in spec.items() if name != "options"}
    return of_kind(family_named(spec["options"]), own.get("kind"), f"{CONFIG}: kind")(**own)


def _subclasses(cls: type[Pretrained]) -> dict[str, type[Pretrained]]:
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found |= _subclasses(child)
    return found
