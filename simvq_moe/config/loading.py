"""From YAML files and flags to a frozen dataclass, strictly.

Files are merged in order, then typed flags go on top. A key that the dataclass does not have or a
value of another type raises `ConfigError`: one line with the key, the value and the way out.
"""

from __future__ import annotations

import contextlib
import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from simvq_moe.config.conversion import SHOWN, WrongValueError, converted, integer, shown
from simvq_moe.errors import ConfigError as ConfigError
from simvq_moe.files.regular import MissingFileError, printable
from simvq_moe.files.yaml import plain_yaml, read_yaml

T = TypeVar("T")


def check_least(**flags: tuple[int | float, int]) -> None:
    """Raise `ConfigError` for a flag whose value is below the least that it may have."""
    for name, (value, least) in flags.items():
        if not value >= least:
            raise ConfigError(f"--{name} {value} < {least}: use at least {least}")


def check_range(**flags: tuple[int | float | None, int, int | float]) -> None:
    """Raise `ConfigError` for a flag whose value is below its least or above its largest; None
    stands for a flag that is not given."""
    for name, (value, least, most) in flags.items():
        if value is not None:
            check_least(**{name: (value, least)})
            if value > most:
                raise ConfigError(f"--{name} {value} > {most:,}: use at most that")


def merge_files(schema: type[T], files: Sequence[Path]) -> T:
    """The dataclass with its defaults overridden by each YAML file in order."""
    content: dict[str, Any] = {}
    for file in files:
        found = _read_config(file)
        _Reading(schema, str(file)).section(schema, found)  # so that an error names the file
        content = _on_top(content, found)
    reading = _Reading(schema, str(files[-1]) if files else "config")
    config = reading.section(schema, content)
    if missing := ", ".join(sorted(reading.missing)):
        raise ConfigError(f"{reading.origin} does not set {missing}: add what is missing")
    return config


def with_overrides(config: T, overrides: Mapping[str, Any], origin: str) -> T:
    """config with a nested mapping of overrides, as an arm of a sweep gives them."""
    return _Reading(type(config), origin).section(type(config), overrides, config)


def with_flags(config: T, flags: Sequence[str], prog: str) -> T:
    """config with `--section.key value` flags on top; `--help` prints every field."""
    # launchers append the local rank, which every rank also finds in its environment
    own = [flag for flag in flags if not flag.startswith("--local_rank")]
    whole = {"default": config, "config": (tyro.conf.FlagConversionOff,)}
    found, unknown = parse_flags(type(config), own, prog, return_unknown_args=True, **whole)
    if unknown:
        raise unknown_flags(unknown, list(flatten(config)))
    return found


def parse_flags(schema: Any, flags: Sequence[str], prog: str, **options: Any) -> Any:
    """What tyro makes of flags; its boxed errors become a `ConfigError` of one line.

    Args:
        options: of `tyro.cli`.
    """
    console = io.StringIO()
    try:
        with contextlib.redirect_stderr(console):
            return tyro.cli(
                schema, args=flags, prog=prog, use_underscores=True, registry=_words(), **options
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _flag_error(console.getvalue()) from None


def to_yaml(config: Any) -> str:
    """YAML that `merge_files` reads back to an equal config."""
    return plain_yaml(asdict(config))


def mapping_to_yaml(content: Mapping[str, Any]) -> str:
    """YAML of nested mappings, as `to_yaml` writes them."""
    return plain_yaml(content)


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
    leaf = word.rsplit(".", 1)[-1]
    close = (
        [key for key in known if key.endswith(f".{leaf}")][:2]
        or difflib.get_close_matches(word, known, n=2, cutoff=0.6)
        or [
            key
            for key in known
            if difflib.SequenceMatcher(None, leaf, key.rsplit(".")[-1]).ratio() > 0.75
        ][:2]
    )
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return read_yaml(file)
    except MissingFileError:
        raise ConfigError(
            f"--config {file} does not exist: give a YAML file, such as those in configs/"
        ) from None


def _on_top(below: Any, above: Any) -> Any:
    """Two plain contents merged; whatever is no mapping takes the place of what it lies on."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _on_top(below.get(key), value) for key, value in above.items()}


@dataclass
class _Reading:
    """From nested plain mappings to a dataclass."""

    root: Any
    """Class of the whole."""
    origin: str
    """Where the mappings come from, for errors."""
    missing: list[str] = field(default_factory=list)
    """Takes up keys without default that are not set; without them there is no whole."""

    def section(self, schema: Any, content: Any, base: Any = None, key: str = "") -> Any:
        """An instance of a dataclass, or base with what content has; None: a key is missing."""
        if not isinstance(content, Mapping):
            raise ConfigError(f"{self.origin}: {key} {shown(content)}: keys and values expected")
        kinds = _field_types(schema)
        inside = f"{key}." if key else ""
        found: dict[str, Any] = {}
        for name, value in content.items():
            if name not in kinds:
                raise self._unknown(schema, inside, name)
            held = getattr(base, name, None)
            found[name] = self.value(kinds[name], value, held, inside + name)
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

    def _unknown(self, schema: Any, inside: str, name: str) -> ConfigError:
        known = {*key_names(self.root), *key_names(schema, inside)}
        hint = suggestion(inside + name, sorted(known))
        key = printable((inside + name)[:SHOWN])
        return ConfigError(f"{self.origin}: unknown key {key}.{hint} --help lists every key")


def _is_required(of: Any) -> bool:
    return of.default is MISSING and of.default_factory is MISSING


def _section(kind: Any) -> Any:
    """The dataclass that a field's type is, or is where it is not None; None: it is none."""
    kinds = (kind, *(get_args(kind) if get_origin(kind) is not dict else ()))
    return next((one for one in kinds if is_dataclass(one)), None)


@lru_cache
def _field_types(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema)


def key_names(schema: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a dataclass."""
    names = []
    for name, kind in _field_types(schema).items():
        names.append(f"{prefix}{name}")
        if (section := _section(kind)) is not None:
            names += key_names(section, f"{prefix}{name}.")
    return names


def _flag_error(console: str) -> ConfigError:
    """tyro's boxed error, between its first two rules, as one line."""
    parts: list[list[str]] = [[]]
    for line in console.splitlines():
        if line.startswith("╭") or not line.strip(" │╰╯─-"):
            parts.append([])
        else:
            parts[-1].append(line.strip(" │"))
    message = next((" ".join(part) for part in parts[1:] if part), " ".join(console.split()))
    return ConfigError(f"{printable(message).rstrip('.')}. --help lists every flag")


def unknown_flags(flags: Sequence[str], known: Sequence[str]) -> ConfigError:
    """An error that names flags which no field has, and the closest fields."""
    name = flags[0].split("=")[0].lstrip("-")
    words = printable(" ".join(flags)[:SHOWN])
    return ConfigError(f"unknown {words}.{suggestion(name, known)} --help lists every flag")


def _words() -> ConstructorRegistry:
    """How tyro reads the words of flags: an integer also as 1e3."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
        if info.type is not int:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT",
            instance_from_str=_integer_word,
            is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _integer_word(words: Sequence[str]) -> int:
    try:
        return integer(words[0])
    except WrongValueError as error:
        raise ValueError(f"{shown(words[0])}: {error}") from None
