"""From YAML files and nested mappings to a frozen dataclass, strictly.

Files are merged in order; `flags` puts typed flags on top. A key that the dataclass does not have
or a value of another type raises `ConfigError`: one line with the key, the value and the way out.

A field whose type is a family of `registry` holds a component, which is of the kind that the key
`kind` names, or else of the kind that it was. One rule holds wherever a file, a flag or an arm of a
sweep changes the kind of what it lies on: an option that was set, so that it differs from the
default of the old kind, is kept where the new kind has an option of that name that can take its
value; all others are the new kind's defaults.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from simvq_moe.config.conversion import SHOWN, WrongValueError, converted, shown
from simvq_moe.config.old_keys import new_key
from simvq_moe.config.plugins import check_loaded, load_plugins, named_plugins
from simvq_moe.config.recipes import recipe_file
from simvq_moe.config.registry import (
    Options,
    default_of,
    family_of,
    is_family,
    kinds,
    of_kind,
)
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import MissingFileError, printable
from simvq_moe.files.yaml import plain_yaml, read_yaml

T = TypeVar("T")
FILES = (
    ("groups", ("title", "seeds", "groups", "lr_grid"), "a sweep's file: use `simvq-moe sweep`"),
    ("task", ("task", "data", "train", "moe"), "a run's config: use `simvq-moe train`"),
)
"""A key that only one kind of file has, keys by which that kind is known, and its command."""


def merge_files(schema: type[T], files: Sequence[Path], *, plugins: bool = False) -> T:
    """The dataclass with its defaults overridden by each YAML file in order.

    Args:
        plugins: whether to load the plug-ins that a file names, which is right for files that the
            user has given; otherwise those that are not loaded yet are refused.
    """
    config: Any = None
    so_far: Any = {}
    reading = _Reading(schema, "config")
    for file in files:
        content = _read_config(file)
        named = named_plugins(content)
        load_plugins(named) if plugins else check_loaded(named, str(file))
        reading = _Reading(schema, str(file))
        if config is None and so_far:
            reading.section(schema, content)  # so that an error names the file
            reading.missing.clear()
        so_far = content if config is not None else _on_top(so_far, content)
        config = reading.section(schema, so_far, config)
    config = config if files else reading.section(schema, {})
    if missing := ", ".join(sorted(reading.missing)):
        raise ConfigError(f"{reading.origin} does not set {missing}: add what is missing")
    assert config is not None
    return config


def with_overrides(config: T, overrides: Mapping[str, Any], origin: str) -> T:
    """config with a nested mapping of overrides, as an arm of a sweep gives them, and the plug-ins
    loaded that they name."""
    load_plugins(named_plugins(overrides))
    return _Reading(type(config), origin).section(type(config), overrides, config)


def to_yaml(config: Any) -> str:
    """YAML that `merge_files` reads back to an equal config."""
    return plain_yaml(asdict(config))


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a dataclass by its dotted key."""
    flat: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = value
    return flat


def defaults_of_every_kind(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf that such a config may have, of components of all kinds, with its default.

    Args:
        config: one with defaults, whose own kinds come first.
    """
    found: dict[str, Any] = {}
    for f in fields(config):
        value, key = getattr(config, f.name), prefix + f.name
        family = family_of(type(value)) if isinstance(value, Options) else None
        others = [kind() for kind in kinds(family).values()] if family else []
        for one in (value, *others):
            below = defaults_of_every_kind(one, f"{key}.") if is_dataclass(one) else {key: one}
            found |= {name: default for name, default in below.items() if name not in found}
    return found


def changed(config: Any, default: Any = None, prefix: str = "") -> dict[str, Any]:
    """Every leaf that differs from its default by its dotted key; of a component whose kind is not
    the default one the kind, and what differs from the defaults of its own kind.

    Args:
        default: what it is compared with; None: the defaults of its fields.
    """
    found: dict[str, Any] = {}
    for f in fields(config):
        value, key = getattr(config, f.name), prefix + f.name
        before = _default(type(config), f.name) if default is None else getattr(default, f.name)
        if isinstance(value, Options) and value.kind != before.kind:
            found[f"{key}.kind"] = value.kind
            before = type(value)()
        if is_dataclass(value):
            found |= changed(value, before, f"{key}.")
        elif value != before:
            found[key] = value
    return found


def first_difference(old: Any, new: Any) -> str | None:
    """The first key in which two configs differ, with both values; None: equal."""
    before, after = flatten(old), flatten(new)
    for key, value in after.items():
        if before[key] != value:
            return f"{key} was {before[key]!r} and is now {value!r}"
    return None


def suggestion(word: str, known: Sequence[str]) -> str:
    """ " Did you mean ...?" with the closest known words, or nothing."""
    word = word[:SHOWN]
    leaf = _leaf(word)
    whole = [key for key in known if "." not in key]
    by_likeness = sorted(known, key=lambda key: -_likeness(word, key))
    close = (
        (difflib.get_close_matches(word, whole, n=1, cutoff=0.8) if leaf == word else [])
        or [key for key in by_likeness if _leaf(key) == leaf]
        or [key for key in by_likeness if leaf in _leaf(key).split("_")]
        or [
            key
            for key in difflib.get_close_matches(word, known, n=2, cutoff=0.6)
            if _likeness(leaf, _leaf(key)) > 0.5
        ]
        or [key for key in known if _likeness(leaf, _leaf(key)) > 0.75]
    )[:2]
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _leaf(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return read_yaml(recipe_file(file))
    except MissingFileError:
        raise ConfigError(
            f"--config {file} does not exist: give a YAML file, or a recipe that "
            "`simvq-moe recipes` lists"
        ) from None


def _on_top(below: Any, above: Any) -> Any:
    """Two plain contents merged; whatever is no mapping takes the place of what it lies on."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _on_top(below.get(key), value) for key, value in above.items()}


@dataclass
class _Reading:
    """Makes a dataclass from nested plain mappings."""

    root: Any
    """Class of the whole."""
    origin: str
    """Where the mappings come from, for errors."""
    missing: list[str] = field(default_factory=list)
    """Takes up keys without default that are not set; without them there is no whole."""

    def section(self, schema: Any, content: Any, base: Any = None, key: str = "") -> Any:
        """An instance of a dataclass, or base with what content has; None: a key is missing."""
        if not isinstance(content, Mapping):
            if new := new_key(key):
                raise self._renamed(key, new)
            raise ConfigError(f"{self.origin}: {key} {shown(content)}: keys and values expected")
        if is_family(schema):
            base = default_of(schema) if base is None else base
            at = f"{self.origin}: {key}.kind"
            schema = of_kind(schema, content.get("kind", base.kind), at)
            base = of_other_kind(base, schema)
        types = field_types(schema)
        inside = f"{key}." if key else ""
        found: dict[str, Any] = {}
        for name, value in content.items():
            if name not in types:
                raise self._unknown(schema, base, inside, name, value)
            held = _default(schema, name) if base is None else getattr(base, name)
            found[name] = self.value(types[name], value, held, inside + name)
        if base is not None:
            return replace(base, **found)
        unset = [f.name for f in fields(schema) if f.name not in found and _is_required(f)]
        self.missing += [inside + name for name in unset]
        return None if self.missing else schema(**found)

    def value(self, kind: Any, value: Any, base: Any, key: str) -> Any:
        """What a field of this type is; base: what it is so far, or None."""
        section = _section(kind)
        if section is not None and not (value is None and section is not kind):
            return self.section(section, value, base, key)
        try:
            if kind is Any:
                return _on_top(base, value)
            if get_origin(kind) is not dict:
                return converted(kind, value)
            if not isinstance(value, Mapping):
                raise WrongValueError("keys and values expected")
        except WrongValueError as error:
            raise ConfigError(f"{self.origin}: {key} {shown(value)}: {error}") from None
        held, inner = base or {}, get_args(kind)[1]
        return held | {
            name: self.value(inner, one, held.get(name), f"{key}.{name}")
            for name, one in value.items()
        }

    def _unknown(self, schema: Any, base: Any, inside: str, name: str, value: Any) -> ConfigError:
        key = inside + name
        if new := new_key(key):
            return self._renamed(key, new)
        if isinstance(base, Options) and (others := kinds_with(base, name)):
            return ConfigError(
                f"{self.origin}: {of_another_kind(key, shown(value), base.kind, others)}"
            )
        known = {*key_names(self.root), *key_names(schema, inside)}
        for own, keys, file in FILES:
            if not inside and name in keys and own not in known:
                return ConfigError(f"{self.origin}: {printable(key)} is a key of {file}")
        hint = suggestion(key, sorted(known))
        return ConfigError(
            f"{self.origin}: unknown key {printable(key[:SHOWN])}.{hint} --help lists every key"
        )

    def _renamed(self, key: str, new: str) -> ConfigError:
        return ConfigError(f"{self.origin}: {key} is now {new}: rename it")


def of_other_kind(old: Options, kind: type[Options]) -> Options:
    """Options of this kind, with what was set in others and goes with it; see above."""
    if type(old) is kind:
        return old
    default, types = type(old)(), field_types(kind)
    kept = {
        name: getattr(old, name)
        for name, kind_of_value in types.items()
        if name != "kind"
        and hasattr(old, name)
        and getattr(old, name) != getattr(default, name)
        and _can_be(kind_of_value, getattr(old, name))
    }
    return kind(**kept)


def _can_be(kind: Any, value: Any) -> bool:
    section = _section(kind)
    if section is not None:
        return isinstance(value, section)
    try:
        return converted(kind, value) == value
    except WrongValueError:
        return False


def kinds_with(options: Options, name: str) -> list[str]:
    """The kinds of the same family that have an option of this name."""
    family = family_of(type(options))
    every = kinds(family).items() if family else ()
    return [kind for kind, one in every if name in field_types(one)]


def of_another_kind(key: str, value: str, kind: str, others: Sequence[str]) -> str:
    """What to say of an option that the kind does not have."""
    *first, last = [repr(one) for one in others]
    named = f"{', '.join(first)} or {last}" if first else last
    way = "use that kind" if len(others) == 1 else "use one of them"
    return (
        f"{key} {value} belongs to {key.rpartition('.')[0]}.kind {named}, not {kind!r}: "
        f"drop it, or {way}"
    )


def _is_required(option: Field[Any]) -> bool:
    return option.default is MISSING and option.default_factory is MISSING


def _default(schema: Any, name: str) -> Any:
    """What a field is before anything is said of it; None: it is required."""
    (option,) = (f for f in fields(schema) if f.name == name)
    if option.default is not MISSING:
        return option.default
    return None if option.default_factory is MISSING else option.default_factory()


def _section(kind: Any) -> Any:
    """The dataclass that a field's type is, or is where it is not None; None: it is none."""
    kinds = (kind, *(get_args(kind) if get_origin(kind) is not dict else ()))
    return next((one for one in kinds if is_dataclass(one)), None)


@lru_cache
def field_types(schema: Any) -> dict[str, Any]:
    """The type of every field of a dataclass by its name."""
    types = get_type_hints(schema)
    return {f.name: types[f.name] for f in fields(schema)}


def key_names(schema: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a dataclass, of a component those of all its kinds."""
    names: dict[str, None] = {}
    for one in kinds(schema).values() if is_family(schema) else (schema,):
        for name, kind in field_types(one).items():
            names[f"{prefix}{name}"] = None
            if (section := _section(kind)) is not None:
                names |= dict.fromkeys(key_names(section, f"{prefix}{name}."))
    return list(names)
