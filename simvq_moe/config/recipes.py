"""The recipes of configs/ and the scripts of launch/, which come with the package: found by name,
listed, copied out.

A checkout has them in configs/ and launch/ beside the package, a wheel within it.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import write_atomically

PACKAGE = Path(__file__).parents[1]
FOLDER = "configs"
SCRIPTS = "launch"
OF_A_CLONE = ("test.sh", "gpu_check.sh")
"""Scripts that check a clone, which a wheel has not."""
FIELDS = ("Question", "Command", "Hardware", "Expect")
"""What a recipe's header says, in this order; each may go on over several lines of comment."""
TWIN = "Twin"
"""What some say besides: a recipe of the same question for another machine."""


@dataclass(frozen=True)
class Recipe:
    """A config or sweep with what its header says."""

    name: str
    """The name that `--config` takes, such as image_quickstart or sweeps/quickstart."""
    question: str
    """What it answers."""
    command: str
    """The command that runs it."""
    hardware: str
    """What it needs, and for how many minutes."""
    expect: str
    """The numbers that it gave."""


def folder() -> Path:
    """Where the recipes are."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / FOLDER


def recipe_file(path: Path) -> Path:
    """The path, or, where nothing is there, the recipe of that name: `image_quickstart`, its file's
    name, or its path in a checkout, `configs/image_quickstart.yaml`."""
    parts = path.parts[1:] if path.parts[:1] == (FOLDER,) else path.parts
    if path.exists() or path.is_absolute() or not parts or ".." in parts:
        return path
    named = folder().joinpath(*parts)
    found = [file for file in (named, named.with_name(f"{named.name}.yaml")) if file.is_file()]
    return found[0] if found else path


def recipes() -> Iterator[Recipe]:
    """All that have a header, configs before sweeps, in the order of their names."""
    for file in sorted(folder().rglob("*.yaml"), key=lambda file: (len(file.parts), file)):
        said = _header(file.read_text())
        if FIELDS[0] in said:
            name = file.relative_to(folder()).with_suffix("").as_posix()
            yield Recipe(name, *(said.get(field, "") for field in FIELDS))


def _header(text: str) -> dict[str, str]:
    """What the comment that a file begins with says, by field."""
    said: dict[str, str] = {}
    for line in itertools.takewhile(lambda line: line[:1] == "#", text.splitlines()):
        start, _, rest = line[1:].strip().partition(":")
        if start in (*FIELDS, TWIN):
            said[start] = rest.strip()
        elif said:
            said[next(reversed(said))] += f" {line[1:].strip()}"
    return said


def copy_out(name: str, out: Path) -> str:
    """Copy a recipe to a file of the user's; configs that a sweep names become names of recipes,
    and its header names the copy.

    Returns:
        The command that runs the copy; "": it has no header.

    Raises:
        ConfigError: there is no such recipe, or the file is there already.
    """
    file = recipe_file(Path(name))
    if not file.is_file() or not file.is_relative_to(folder()):
        known = ", ".join(recipe.name for recipe in recipes())
        raise ConfigError(f"{name!r} is no recipe: use one of {known}")
    if out.exists():
        raise ConfigError(f"--out {out} is there already: give another name, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    # a sweep's configs are named relative to its file: ../image_quickstart.yaml
    text = re.sub(r"(\bconfig: *)\.\./([\w/-]+)\.yaml", r"\1\2", file.read_text())
    ours = f"--config {FOLDER}/{file.relative_to(folder()).as_posix()}"
    text = text.replace(ours, f"--config {shlex.quote(str(out))}")
    write_atomically(out, text)
    return _header(text).get("Command", "")


def copy_scripts(out: Path) -> None:
    """Copy the scripts of launch/ to a folder of that name, which must not be there yet: they work
    in the folder above it.

    Raises:
        ConfigError: the folder has another name, or is there already.
    """
    if out.name != SCRIPTS:
        raise ConfigError(f"--out {out} must be a folder named {SCRIPTS}, as the scripts say it")
    if out.exists():
        raise ConfigError(f"--out {out} is there already: give another folder, or remove it")
    inside = PACKAGE / SCRIPTS
    folder = inside if inside.is_dir() else PACKAGE.parent / SCRIPTS
    out.mkdir(parents=True)
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name not in OF_A_CLONE:
            write_atomically(out / file.name, file.read_text())
            (out / file.name).chmod(0o755)
