"""Plug-ins: code of the user's own that registers components, named by `plugins` of a config.

A plug-in is code that runs. It is loaded where the user names it: in a config that a command is
given, or on the command line. A run's folder, which may be anybody's, never loads one by itself.
A package that the user has installed may name modules in the entry points of `GROUP`, which are
loaded without a word in a config.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from simvq_moe.config.conversion import shown
from simvq_moe.errors import ConfigError

GROUP = "simvq_moe.plugins"
PREFIX = "simvq_moe_plugin_"
"""Beginning of the name of the module that a file becomes."""


def load_plugins(names: Sequence[str]) -> None:
    """Import each plug-in, once in a process.

    Args:
        names: files that end with .py, relative to the working directory, or modules.

    Raises:
        ConfigError: there is none of that name, or it raises an error.
    """
    for name in names:
        if is_loaded(name):
            continue
        try:
            if name.endswith(".py"):
                _load_file(Path(name))
            else:
                importlib.import_module(name)
        except Exception as error:
            raise ConfigError(
                f"plugins {name!r} can't be loaded: {type(error).__name__}: "
                f"{' '.join(str(error).split())}: give a file or a module that imports"
            ) from error


@cache
def load_installed_plugins() -> None:
    """Import what installed packages name as plug-ins, once in a process.

    Raises:
        ConfigError: one of them raises an error.
    """
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            raise ConfigError(
                f"the installed plug-in {entry.value!r} can't be loaded: {type(error).__name__}: "
                f"{' '.join(str(error).split())}: mend it, or uninstall its package"
            ) from error


def is_loaded(name: str) -> bool:
    """Whether a plug-in of this file name, or this module, is in the process."""
    return _module(name) in sys.modules


def named_plugins(content: Any) -> list[str]:
    """The plug-ins that a file of a config names; what else it says is checked later."""
    given = content.get("plugins") if isinstance(content, dict) else None
    return [one for one in given if isinstance(one, str)] if isinstance(given, list) else []


def check_loaded(names: Sequence[str], origin: str) -> None:
    """Raise `ConfigError` for a plug-in of a run's folder that the user has not asked for."""
    for name in names:
        if not is_loaded(name):
            raise ConfigError(
                f"{origin} names the plug-in {shown(name)}, which is code: read it first, and "
                "allow it with --plugins FILE"
            )


def _load_file(file: Path) -> None:
    spec = importlib.util.spec_from_file_location(_module(file.name), file)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(str(file))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise


def _module(name: str) -> str:
    return f"{PREFIX}{Path(name).stem}" if name.endswith(".py") else name
