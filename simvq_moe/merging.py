"""From YAML files and flags to a frozen dataclass, strictly.

Files are merged in order, then typed flags go on top. A key that the dataclass does not have or a
value of another type raises `ConfigError`: one line with the key, the value and the way out.
"""

from __future__ import annotations

import contextlib
import difflib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from simvq_moe.errors import ConfigError as ConfigError

T = TypeVar("T")


def check_least(**flags: tuple[int | float, int]) -> None:
    """Raise `ConfigError` for a flag whose value is below the least that it may have."""
    for name, (value, least) in flags.items():
        if not value >= least:
            raise ConfigError(f"--{name} {value} < {least}: use at least {least}")


def merge_files(schema: type[T], files: Sequence[Path]) -> T:
    """The dataclass with its defaults overridden by each YAML file in order."""
    merged = _writable(OmegaConf.structured(schema))
    for file in files:
        merged = merge(_writable(merged), _read_yaml(file), origin=str(file))
    if missing := sorted(OmegaConf.missing_keys(merged)):
        file = files[-1] if files else "config"
        raise ConfigError(f"{file} does not set {', '.join(missing)}: add what is missing")
    return to_dataclass(merged, schema)


def merge(base: DictConfig, overrides: Any, origin: str) -> DictConfig:
    """base with overrides; an unknown key or a value of another type is a `ConfigError`."""
    try:
        merged = OmegaConf.merge(base, overrides)
    except ConfigKeyError as error:
        key = error.full_key or str(error.key)
        raise ConfigError(
            f"{origin}: unknown key {key}.{suggestion(key, key_names(base))} --help lists every key"
        ) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}: {_locate(base, overrides, error)}") from None
    assert isinstance(merged, DictConfig)
    return merged


def to_dataclass(config: DictConfig, schema: type[T]) -> T:
    """The frozen dataclass that a merged OmegaConf config stands for."""
    found = OmegaConf.to_object(config)
    assert isinstance(found, schema)
    return found


def with_overrides(config: T, overrides: Any, origin: str) -> T:
    """config with a nested mapping of overrides, as an arm of a sweep gives them."""
    base = _writable(OmegaConf.structured(config))
    return to_dataclass(merge(base, overrides, origin), type(config))


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
            return tyro.cli(schema, args=flags, prog=prog, use_underscores=True, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _flag_error(console.getvalue()) from None


def to_yaml(config: Any) -> str:
    """YAML that `merge_files` reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def mapping_to_yaml(content: Mapping[str, Any]) -> str:
    """YAML of nested mappings, as `to_yaml` writes them."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(content)))


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
    leaf = word.rsplit(".", 1)[-1]
    close = (
        difflib.get_close_matches(word, known, n=2, cutoff=0.6)
        or [
            key
            for key in known
            if difflib.SequenceMatcher(None, leaf, key.rsplit(".")[-1]).ratio() > 0.75
        ][:2]
    )
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _read_yaml(file: Path) -> Any:
    if not file.is_file():
        raise ConfigError(
            f"--config {file} does not exist: give a YAML file, such as those in configs/"
        )
    try:
        content = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{file} must hold keys and values, not a {type(content).__name__}")
    return content


def _writable(config: DictConfig) -> DictConfig:
    """Frozen dataclasses become read-only nodes; merging needs them writable."""
    OmegaConf.set_readonly(config, False)
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing()):
            _writable(node)
    return config


def key_names(config: DictConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a config."""
    names = []
    for key in config:
        node = config._get_node(key)
        names.append(f"{prefix}{key}")
        if isinstance(node, DictConfig):
            names += key_names(node, f"{prefix}{key}.")
    return names


def _locate(base: DictConfig, overrides: Any, error: OmegaConfBaseException) -> str:
    """The key, its value and the reason of a failed merge, found by merging leaf by leaf."""
    reason = str(error).splitlines()[0]
    for key, value in _leaves(overrides):
        try:
            OmegaConf.merge(base, OmegaConf.from_dotlist([]), _nested(key, value))
        except OmegaConfBaseException as found:
            reason = str(found).splitlines()[0].replace("'$VALUE'", repr(value))
            return f"{key} {value!r}: {reason}"
    return reason


def _leaves(overrides: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    content = OmegaConf.to_container(overrides) if OmegaConf.is_config(overrides) else overrides
    for key, value in dict(content).items():  # pyright: ignore[reportCallIssue, reportArgumentType]
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _flag_error(console: str) -> ConfigError:
    """tyro's boxed error, between its first two rules, as one line."""
    parts: list[list[str]] = [[]]
    for line in console.splitlines():
        if line.startswith("╭") or not line.strip(" │╰╯─-"):
            parts.append([])
        else:
            parts[-1].append(line.strip(" │"))
    message = next((" ".join(part) for part in parts[1:] if part), " ".join(console.split()))
    return ConfigError(f"{message.rstrip('.')}. --help lists every flag")


def unknown_flags(flags: Sequence[str], known: Sequence[str]) -> ConfigError:
    """An error that names flags which no field has, and the closest fields."""
    name = flags[0].split("=")[0].lstrip("-")
    return ConfigError(
        f"unknown {' '.join(flags)}.{suggestion(name, known)} --help lists every flag"
    )
