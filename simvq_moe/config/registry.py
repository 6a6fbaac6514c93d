"""Components by their kind: a config names one, and its options say all there is to say about it.

A family (quantizers, routers, ...) is a dataclass with the options that all of its kinds share. A
kind is a subclass with options of its own, registered in the file of the component that it builds:

    @register
    @dataclass(frozen=True)
    class MyRouterOptions(RouterOptions):
        kind: Literal["mine"] = "mine"
        sharpness: Weight = 1.0
        \"""Factor on the logits.\"""

YAML keys, flags, help and checks follow from that class alone. The files of a family are imported
when its kinds are first asked for; a plug-in registers kinds of its own in the same way.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, TypeVar

from simvq_moe.config.plugins import load_installed_plugins
from simvq_moe.errors import ConfigError


@dataclass(frozen=True)
class Options(ABC):  # noqa: B024  # each family has methods that its kinds must have
    """What every kind of every family has."""

    kind: str = ""

    def problems(self, at: str, config: Any) -> Iterator[str]:
        """What can't run: the key, the value and the way out, a line each.

        Args:
            at: key of these options in the config, such as "moe.router".
            config: the whole config.
        """
        del at, config
        return iter(())


T = TypeVar("T", bound=Options)


@dataclass
class _Family:
    package: str
    """Module, or package of modules, that holds our own kinds."""
    default: str
    kinds: dict[str, type[Options]] = field(default_factory=dict)
    imported: bool = False


_FAMILIES: dict[type[Options], _Family] = {}


def family(*, package: str, default: str) -> Callable[[type[T]], type[T]]:
    """Make a dataclass of shared options a family.

    Args:
        package: where its kinds are registered; imported when they are first asked for.
        default: the kind of a config that names none.
    """

    def made(options: type[T]) -> type[T]:
        _FAMILIES[options] = _Family(package, default)
        return options

    return made


def register(options: type[T]) -> type[T]:
    """Make a subclass of a family one of its kinds, under the default of its field `kind`.

    Raises:
        ValueError: another class has that kind, or no base of the class is a family.
    """
    of_family = family_of(options)
    kind = next(f.default for f in fields(options) if f.name == "kind")
    if of_family is None or not isinstance(kind, str) or not kind:
        raise ValueError(f"{options.__name__} needs a family among its bases, and a kind")
    known = _FAMILIES[of_family].kinds
    there = known.setdefault(kind, options)
    if (there.__module__, there.__qualname__) != (options.__module__, options.__qualname__):
        raise ValueError(
            f"kind {kind!r} of {options.__name__} is taken by {there.__module__}."
            f"{there.__name__}: use another word"
        )
    known[kind] = options  # the same class again, of a module that was loaded anew
    return options


def is_family(kind: Any) -> bool:
    """Whether a field of this type holds a component."""
    return kind in _FAMILIES


def family_of(options: type[Options]) -> type[Options] | None:
    """The family that a class of options is a kind of, or is."""
    return next((base for base in options.__mro__ if base in _FAMILIES), None)


def family_named(name: object) -> type[Options]:
    """The family whose class has this name.

    Raises:
        ConfigError: there is none.
    """
    named = {one.__name__: one for one in _FAMILIES}
    if not isinstance(name, str) or name not in named:
        raise ConfigError(f"options of {name!r}: use one of {', '.join(map(repr, named))}")
    return named[name]


def kinds(family: type[T]) -> Mapping[str, type[T]]:
    """Every kind of a family by its name."""
    found = _FAMILIES[family]
    if not found.imported:
        found.imported = True
        import_all(found.package)
        load_installed_plugins()
    return MappingProxyType(found.kinds)  # pyright: ignore[reportReturnType]


@cache
def import_all(package: str) -> None:
    """Import a module and, where it is a package, the modules of it."""
    module = importlib.import_module(package)
    for inner in pkgutil.iter_modules(getattr(module, "__path__", ())):
        importlib.import_module(f"{package}.{inner.name}")


def of_kind(family: type[T], kind: object, at: str) -> type[T]:
    """The options of a kind.

    Args:
        at: what the user calls it, for the error, such as "moe.router.kind".

    Raises:
        ConfigError: there is no such kind.
    """
    known = kinds(family)
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(f"{at} {kind!r}: use one of {', '.join(map(repr, known))}")
    return known[kind]


def default_of(family: type[T]) -> T:
    """The options of a config that names no kind."""
    return kinds(family)[_FAMILIES[family].default]()


def as_options(family: type[T], given: str | T, name: str) -> T:
    """Options as given, or those of a kind with its defaults: `MoE(router="cosine")`.

    Raises:
        ValueError: there is no such kind.
    """
    if isinstance(given, family):
        return given
    try:
        return of_kind(family, given, name)()
    except ConfigError as error:
        raise ValueError(str(error)) from None


def components(config: Any, prefix: str = "") -> Iterator[tuple[str, Options]]:
    """Every component of a config with its dotted key, outer ones first."""
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, Options):
            yield prefix + f.name, value
        if is_dataclass(value):
            yield from components(value, f"{prefix}{f.name}.")
