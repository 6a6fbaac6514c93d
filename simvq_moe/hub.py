"""Save and load whole modules: safetensors beside a config.json that rebuilds them.

The config holds the class name and the constructor's arguments, themselves plain values, options of
components or modules of this kind, and nothing executable: classes are looked up among those that
are imported, and kinds of options among those that are registered.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from simvq_moe.config.moe import MoEConfig
from simvq_moe.config.registry import Options, family_named, family_of, of_kind
from simvq_moe.files.regular import (
    BrokenFileError,
    parse_json,
    read_bytes,
    write_atomically,
    written_whole,
)
from simvq_moe.files.tensors import StoredWeights, read_safetensors

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
PRECISION, AGAIN = "precision", "again"
PRECISIONS = tuple(str(t) for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64))
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

    precision: torch.dtype | None = None
    """Of what a module makes without a tensor that shows it; None: there is no such thing."""

    depths: ClassVar[tuple[str, ...]] = ()
    """Arguments that are numbers of units, each of which has a tensor of its own, or more."""

    def save_pretrained(
        self, directory: str | Path, *, card: Mapping[str, str | bytes] | None = None
    ) -> None:
        """Write config.json, model.safetensors and a model card into the directory.

        Args:
            card: files of the card by name, README.md among them, such as
                `inference.cards.card_of_run` makes; None: a README.md that says what it is, unless
                there is one.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with written_whole(directory / WEIGHTS) as aside:
            save_model(self, str(aside))
        write_atomically(directory / CONFIG, json.dumps(_spec(self), indent=2) + "\n")
        if card is None and (directory / CARD).exists():
            return
        for name, content in (card or {CARD: card_text(self)}).items():
            write_atomically(directory / name, content)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: Mapping[str, str | bytes] | None = None,
        commit_message: str = "Push model",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository of the Hugging Face hub, made unless
        it is there; the address of the commit.

        Args:
            repo_id: "name" or "owner/name".
            card: see `save_pretrained`.
            commit_message, private, token, branch, create_pr: as of
                `huggingface_hub.PyTorchModelHubMixin`.
        """
        from huggingface_hub import HfApi  # takes half as long to import as torch

        hub = HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, card=card)
            return hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
            )

    @classmethod
    def from_pretrained(
        cls: type[Self],
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """The module saved in a directory or in a Hugging Face repository of that name, in its
        precision and in evaluation mode.

        Args:
            revision, token, cache_dir, local_files_only: of the repository, as of
                `huggingface_hub.PyTorchModelHubMixin`.

        Raises:
            ValueError: another class was saved there, or files that are broken.
        """
        directory = Path(source)
        if not directory.is_dir():
            from huggingface_hub import snapshot_download  # takes half as long to import as torch

            at = {"revision": revision, "token": token, "cache_dir": cache_dir}
            options: dict[str, Any] = at | {"local_files_only": local_files_only}
            found = snapshot_download(str(source), allow_patterns=[CONFIG, WEIGHTS], **options)
            directory = Path(found)
        spec = parse_json(read_bytes(directory / CONFIG, limit=CONFIG_LIMIT), directory / CONFIG)
        weights = read_safetensors(directory / WEIGHTS)
        _check_depths(spec, len(weights), directory)
        with torch.device("meta"):  # described first, because its sizes may be anything
            described = _made(spec, directory)
        if not isinstance(described, cls):
            name = type(described).__name__
            raise ValueError(f"{source} holds a {name}: use {name}.from_pretrained")
        _check_sizes(described, weights, directory)
        module = _made(spec, directory)
        assert isinstance(module, cls)
        _take_precision(module, weights)
        try:
            load_model(module, str(directory / WEIGHTS))
        except RuntimeError as error:
            raise BrokenFileError(directory / WEIGHTS, f"is not of {CONFIG}: {error}") from None
        return module.eval()


def card_text(module: Pretrained, *, about: str = "") -> str:
    """A model card: what the module is, and how it is loaded.

    Args:
        about: sections in Markdown that follow.
    """
    name, home = type(module).__name__, type(module).__module__
    parameters = sum(parameter.numel() for parameter in module.parameters())
    spec = json.dumps(_spec(module)["arguments"], indent=2)
    return f"""---
library_name: simvq-moe
tags:
- simvq-moe
---
# {name}

{parameters:,} parameters.

```python
from {home} import {name}

model = {name}.from_pretrained("REPOSITORY_OR_FOLDER")
```
{about}
## Arguments

```json
{spec}
```
"""


def _check_depths(spec: Any, tensors: int, directory: Path) -> None:
    """Raise `BrokenFileError` for a module of more units than there are tensors."""
    if not isinstance(spec, dict) or not isinstance(spec.get("arguments"), dict):
        return
    cls = _subclasses(Pretrained).get(str(spec.get("class")))
    for name in () if cls is None else cls.depths:
        value = spec["arguments"].get(name, 0)
        if isinstance(value, int | float) and value > tensors:
            reason = f"has {name} {value} for {tensors} tensors"
            raise BrokenFileError(directory / CONFIG, reason)
    for value in spec["arguments"].values():
        _check_depths(value, tensors, directory)


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


def _take_precision(module: nn.Module, weights: StoredWeights) -> None:
    """Give the module's tensors the precision of the saved ones: float64 would be rounded, and
    bfloat16 would take twice the memory."""
    named = (module.named_parameters, module.named_buffers)
    for name, tensor in (pair for each in named for pair in each(remove_duplicate=False)):
        form = weights.forms.get(name)
        if form is not None and form.dtype.is_floating_point and tensor.is_floating_point():
            tensor.data = tensor.data.to(form.dtype)


def _made(spec: Any, directory: Path) -> Any:
    try:
        return _build(spec)
    except NOT_MADE as error:
        raise BrokenFileError(directory / CONFIG, f"describes no module: {error}") from None


def _spec(value: Any, met: dict[int, int] | None = None) -> Any:
    """Plain data for a constructor's argument.

    Args:
        met: number of each module by its address, in the order in which they were met; one that is
            met again is {"again": number}.
    """
    met = {} if met is None else met
    if isinstance(value, Pretrained):
        if id(value) in met:
            return {AGAIN: met[id(value)]}
        met[id(value)] = len(met)
        given = value.__dict__["arguments"]
        arguments = {name: _spec(_now(value, name, item), met) for name, item in given.items()}
        own = {} if value.precision is None else {PRECISION: str(value.precision)}
        return {"class": type(value).__name__, "arguments": arguments, **own}
    if isinstance(value, Options):
        of = family_of(type(value))
        assert of is not None
        own = {f.name: _spec(getattr(value, f.name), met) for f in fields(value)}
        return {"options": of.__name__, **own}
    if isinstance(value, MoEConfig):
        own = {f.name: _spec(getattr(value, f.name), met) for f in fields(value)}
        return {"options": MoEConfig.__name__, **own}
    if isinstance(value, nn.Module):  # a network of others, which judges in training alone
        return None
    return [_spec(item, met) for item in value] if isinstance(value, list | tuple) else value


def _now(module: Pretrained, name: str, given: Any) -> Any:
    """What has become of an argument that is a module or several, such as a quantizer that was
    folded."""
    now = getattr(module, name, None)
    return now if _are_pretrained(given) and _are_pretrained(now) else given


def _are_pretrained(value: Any) -> bool:
    several = value if isinstance(value, list | tuple) else [value]
    return bool(several) and all(isinstance(one, Pretrained) for one in several)


def _build(spec: Any, made: list[Any] | None = None) -> Any:
    """What `_spec` described.

    Args:
        made: the modules so far, in the order in which they were met.
    """
    made = [] if made is None else made
    if isinstance(spec, list):
        return [_build(item, made) for item in spec]
    if isinstance(spec, dict) and "options" in spec:
        return _options(spec, made)
    if isinstance(spec, dict) and AGAIN in spec:
        number = spec[AGAIN]
        if number not in range(len(made)) or made[number] is None:
            raise ValueError(f"{CONFIG}: {AGAIN} {number!r} is none of the modules before it")
        return made[number]
    if not isinstance(spec, dict) or "class" not in spec:
        return spec
    known = _subclasses(Pretrained)
    if not isinstance(spec["class"], str) or spec["class"] not in known:
        raise ValueError(f"{CONFIG}: class {spec['class']!r} is none of {sorted(known)}")
    if not isinstance(spec.get("arguments"), dict):
        raise ValueError(f"{CONFIG}: class {spec['class']!r} has no arguments")
    place = len(made)
    made.append(None)  # it is not its own part
    arguments = {name: _build(value, made) for name, value in spec["arguments"].items()}
    made[place] = module = known[spec["class"]](**arguments)
    if module.precision is not None and PRECISION in spec:
        if spec[PRECISION] not in PRECISIONS:
            raise ValueError(f"{CONFIG}: {PRECISION} {spec[PRECISION]!r} is none of {PRECISIONS}")
        module.precision = getattr(torch, spec[PRECISION].removeprefix("torch."))
    return module


def _options(spec: dict[str, Any], made: list[Any]) -> Options | MoEConfig:
    """The options of a component, its family and kind by name and the values of its fields, or of a
    whole layer."""
    own = {name: _build(value, made) for name, value in spec.items() if name != "options"}
    if spec["options"] == MoEConfig.__name__:
        return MoEConfig(**own)
    return of_kind(family_named(spec["options"]), own.get("kind"), f"{CONFIG}: kind")(**own)


def _subclasses(cls: type[Pretrained]) -> dict[str, type[Pretrained]]:
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found |= _subclasses(child)
    return found
