"""Flags on top of a config: `--section.key value`, typed, by tyro.

Kinds of components are applied first, because they decide which options there are; the rule of
`loading` says what stays of the options so far.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from simvq_moe.config.checks_values import number_problems
from simvq_moe.config.conversion import SHOWN, WrongValueError, integer, shown
from simvq_moe.config.docs import field_docs
from simvq_moe.config.loading import (
    flatten,
    kinds_with,
    of_another_kind,
    of_other_kind,
    suggestion,
)
from simvq_moe.config.old_keys import new_key
from simvq_moe.config.plugins import load_plugins
from simvq_moe.config.ranges import ranges_of
from simvq_moe.config.registry import Options, family_of, kinds, of_kind
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import printable

T = TypeVar("T")

HELP = ("-h", "--help")
HELP_OF_ONE = re.compile("[│ ] {9}")
"""How the lines begin that say what a missing flag is, below its name."""
TRUTHS = {"True": True, "true": True, "False": False, "false": False}


def with_flags(
    config: T,
    flags: Sequence[str],
    prog: str,
    meaningful: Callable[[T, str | None], Collection[str]] | None = None,
) -> T:
    """config with `--section.key value` flags on top; `--help` prints the fields that mean
    something to the config, `--help all` every field.

    Args:
        meaningful: names of these fields, of the config and the value of a flag `--task`; None:
            all.
    """
    # launchers append the local rank, which every rank also finds in its environment
    own = [flag for flag in flags if not flag.startswith("--local_rank")]
    load_plugins(_values_of("plugins", own))
    config, own = _with_kinds(config, own)
    asked = next((i for i, flag in enumerate(own) if flag in HELP), None)
    printed = None
    if asked is not None and meaningful is not None and own[asked + 1 : asked + 2] != ["all"]:
        printed = meaningful(config, next(iter(_values_of("task", own)), None))
    whole = {"default": config, "config": (tyro.conf.FlagConversionOff,), "printed": printed}
    try:
        found, unknown = parse_known_flags(type(config), own, prog, **whole)
    except SystemExit:
        if printed is not None:
            print("--help all prints the fields of other tasks as well.")
        raise
    if unknown:
        raise _unknown_key(unknown, config)
    return found


def _values_of(name: str, flags: Sequence[str]) -> list[str]:
    """The words after a flag, up to the next one."""
    found: list[str] = []
    inside = False
    for word in flags:
        if word.startswith("--"):
            inside = word == f"--{name}"
            found += [word.partition("=")[2]] if word.startswith(f"--{name}=") else []
        elif inside:
            found.append(word)
    return found


def _with_kinds(config: T, flags: Sequence[str]) -> tuple[T, list[str]]:
    """config with the kinds that flags name, the last where one is named twice, and the others."""
    named: dict[str, list[str]] = {}
    rest: list[str] = []
    words = list(flags)
    while words:
        word, *words = words
        name, equals, value = word.partition("=")
        name = _key(name)
        if not word.startswith("--") or not name.endswith(".kind"):
            rest.append(word)
        elif equals:
            named[name] = [value, word]
        elif words and not words[0].startswith("--"):
            named[name] = [words[0], word, words.pop(0)]
        else:
            rest.append(word)
    # the outer ones first, because they decide which inner ones there are
    for name, (value, *own) in sorted(named.items(), key=lambda one: one[0].count(".")):
        found = _with_kind(config, name.split(".")[:-1], value, f"--{name}")
        rest += own if found is None else []
        config = config if found is None else found
    return config, rest


def _with_kind(config: Any, path: Sequence[str], kind: str, flag: str) -> Any:
    """config with another kind of the component at a path; None: there is no component."""
    if path:
        below = getattr(config, path[0], None)
        inner = None if below is None else _with_kind(below, path[1:], kind, flag)
        return None if inner is None else replace(config, **{path[0]: inner})
    if not isinstance(config, Options):
        return None
    family = family_of(type(config))
    assert family is not None
    try:
        return of_other_kind(config, of_kind(family, kind, flag))
    except ConfigError as error:
        raise ConfigError(f"{error}. --help lists every flag") from None


def _unknown_key(flags: Sequence[str], config: Any) -> ConfigError:
    """What to say of flags that no field has: what became of an old one, or whose option it is."""
    name, equals, value = flags[0].partition("=")
    key = _key(name)
    if new := new_key(key):
        return ConfigError(f"--{key} is now --{new}: rename it. --help lists every flag")
    holder: Any = config
    *path, leaf = key.split(".")
    for part in path:
        holder = getattr(holder, part, None)
    if isinstance(holder, Options) and (others := kinds_with(holder, leaf)):
        given = printable((value if equals else " ".join(flags[1:2]))[:SHOWN])
        said = of_another_kind(key, given, holder.kind, others)
        return ConfigError(f"--{said}. --help lists every flag")
    return unknown_flags(flags, list(flatten(config)))


def _key(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def parse_flags(schema: Any, flags: Sequence[str], prog: str) -> Any:
    """The flags of a command, whose numbers are in the ranges of their fields; see `_parsed`."""
    found = _parsed(schema, flags, prog)
    for name, bounds in ranges_of(found).items():
        value = getattr(found, name)
        if value is not None:
            for message in number_problems(f"--{name}", value, value, bounds):
                raise ConfigError(message)
    return found


def parse_known_flags(
    schema: Any, flags: Sequence[str], prog: str, **options: Any
) -> tuple[Any, list[str]]:
    """The flags that a schema has, whose ranges are not looked at, and the others."""
    return _parsed(schema, flags, prog, return_unknown_args=True, **options)


def _parsed(
    schema: Any,
    flags: Sequence[str],
    prog: str,
    printed: Collection[str] | None = None,
    **options: Any,
) -> Any:
    """What tyro makes of flags; its boxed errors become a `ConfigError` of one line.

    Args:
        printed: the fields of the schema that `--help` prints; None: all.
        options: of `tyro.cli`.
    """
    console, rules = io.StringIO(), _rules()
    if printed is not None:

        @rules.struct_rule
        def _(info: StructTypeInfo) -> StructConstructorSpec | None:
            if info.type is not schema:
                return None
            types = get_type_hints(schema, include_extras=True)
            return _struct(info.default, types, field_docs(schema), printed)

    try:
        with contextlib.redirect_stderr(console):
            return tyro.cli(
                schema, args=flags, prog=prog, use_underscores=True, registry=rules, **options
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _flag_error(console.getvalue()) from None


def _flag_error(console: str) -> ConfigError:
    """tyro's boxed error, between its first two rules, as one line."""
    parts: list[list[str]] = [[]]
    for line in console.splitlines():
        if line.startswith("╭") or not line.strip(" │╰╯─-"):
            parts.append([])
        elif not (" ".join(parts[-1]).startswith("Missing from") and HELP_OF_ONE.match(line)):
            parts[-1].append(line.strip(" │"))
    message = next((" ".join(part) for part in parts[1:] if part), " ".join(console.split()))
    return ConfigError(f"{printable(message).rstrip('.')}. --help lists every flag")


def unknown_flags(flags: Sequence[str], known: Sequence[str]) -> ConfigError:
    """An error that names flags which no field has, and the closest fields."""
    name = flags[0].split("=")[0].lstrip("-")
    words = printable(" ".join(flags)[:SHOWN])
    return ConfigError(f"unknown {words}.{suggestion(name, known)} --help lists every flag")


def _rules() -> ConstructorRegistry:
    """How tyro reads integers, also as 1e3, truth, also as true, and paths, but for the empty one,
    and what it shows of a component."""
    registry = ConstructorRegistry()
    words: dict[Any, tuple[str, Callable[[Sequence[str]], Any]]]
    words = {int: ("INT", _integer_word), bool: ("{True,False}", _truth), Path: ("PATH", _path)}

    @registry.primitive_rule
    def _(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        kind: Any = info.type
        if kind not in words:
            return None
        metavar, read = words[kind]
        concrete = type(Path()) if kind is Path else kind  # True is no integer
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=read,
            is_instance=lambda value: type(value) is concrete,
            str_from_instance=lambda value: [str(value)],
        )

    @registry.struct_rule
    def _(info: StructTypeInfo) -> StructConstructorSpec | None:
        return _component(info.default) if isinstance(info.default, Options) else None

    return registry


def _component(options: Options) -> StructConstructorSpec:
    """The options of the kind in force, and the names of all kinds."""
    family = family_of(type(options))
    assert family is not None
    types = get_type_hints(type(options), include_extras=True)
    docs = dict(field_docs(type(options)))  # a copy, because those are kept
    types["kind"] = Literal[tuple(kinds(family))]  # pyright: ignore[reportInvalidTypeForm]
    own = "The options below are those of" if len(types) > 1 else "There are no options of"
    docs["kind"] = f"{docs['kind']} {own} {options.kind!r}.".strip()
    return _struct(options, types, docs, types)


def _struct(
    options: Any, types: Mapping[str, Any], docs: Mapping[str, str], names: Collection[str]
) -> StructConstructorSpec:
    """The fields of these names."""
    return StructConstructorSpec(
        instantiate=type(options),
        fields=tuple(
            StructFieldSpec(f.name, types[f.name], getattr(options, f.name), docs[f.name])
            for f in fields(options)
            if f.name in names
        ),
    )


def _integer_word(words: Sequence[str]) -> int:
    try:
        return integer(words[0])
    except WrongValueError as error:
        raise ValueError(f"{shown(words[0])}: {error}") from None


def _truth(words: Sequence[str]) -> bool:
    if words[0] not in TRUTHS:
        raise ValueError(f"{shown(words[0])} is neither True nor False")
    return TRUTHS[words[0]]


def _path(words: Sequence[str]) -> Path:
    if not words[0]:  # which Path takes for the working directory
        raise ValueError("'' is empty: give a path, or leave it out")
    return Path(words[0])
