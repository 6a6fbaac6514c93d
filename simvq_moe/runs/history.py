"""What git knows of our files: the commit of this checkout, and when a file changed last."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """The commit of our own checkout, if that is what this package runs from; None: it is not, for
    instance installed into an environment inside of another project's checkout.

    Args:
        package: folder of the package.
    """
    root = package.parent
    top = git(package, "rev-parse", "--show-toplevel")
    if top is None or Path(top) != root.resolve():
        return None
    # another project may have copied the package into its root
    own = (f"{package.name}/__init__.py", "pyproject.toml")
    tracked = git(root, "ls-files", "--error-unmatch", "--", *own)
    project = root / "pyproject.toml"
    if tracked is None or 'name = "simvq-moe"' not in project.read_text(errors="replace"):
        return None
    return git(root, "describe", "--always", "--dirty", "--abbrev=12")


def last_change(file: Path) -> tuple[str, str] | None:
    """Commit and date (ISO 8601) of the last change of a file; None: it is in no repository of git,
    or it is not committed as it is."""
    if git(file.parent, "status", "--porcelain", "--", file.name):
        return None
    found = git(file.parent, "log", "-1", "--format=%h %cI", "--abbrev=12", "--", file.name)
    if found is None:
        return None
    commit, date = found.split()
    return commit, date


def shown_name(file: Path) -> str:
    """How records name a file: with its folder, and no path of the machine."""
    return str(file if not file.is_absolute() else Path(file.parent.name, file.name))


def git(folder: Path, *args: str) -> str | None:
    """What git says; None: it is not installed, or says no."""
    # inside of a hook, or of a rebase, variables would name another repository
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        found = subprocess.run(
            ["git", *args],
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError:
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
