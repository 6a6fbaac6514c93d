"""What git knows of our files: the commit of this checkout, and when a file changed last.

A repository may be a stranger's, whose settings name programs that git runs: those that its index
asks for files, filters of what it compares, checks of signatures, ways to fetch what is missing.
None is run here, and no index is locked, which the user may be about to commit.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from simvq_moe.files.regular import read_bytes

QUIET = (
    *("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}"),
    *("-c", "log.showSignature=false"),
)
ALONE = {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none"}
"""Variables for git, the last two for a repository that lacks files on purpose."""


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
    found = git(root, "describe", "--always", "--abbrev=12")
    # describe --dirty would lock the index
    return f"{found}-dirty" if git(root, "status", "--porcelain", "--untracked-files=no") else found


def last_change(file: Path) -> tuple[str, str] | None:
    """Commit and date (ISO 8601) of the last change of a file; None: it is in no repository of git,
    or it is not committed as it is."""
    # by its content, because git would run filters of the repository to compare it
    committed = git(file.parent, "rev-parse", "--verify", f"HEAD:./{file.name}")
    if committed is None or committed != _name_of(read_bytes(file), len(committed)):
        return None
    found = git(file.parent, "log", "-1", "--format=%h %cI", "--abbrev=12", "--", file.name)
    if found is None:
        return None
    commit, date = found.split()
    return commit, date


def _name_of(content: bytes, length: int) -> str:
    """How git names a file of this content, in so many digits."""
    sha = hashlib.sha256 if length == 64 else hashlib.sha1
    return sha(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def shown_name(file: Path) -> str:
    """How records name a file: with its folder, and no path of the machine."""
    return str(file if not file.is_absolute() else Path(file.parent.name, file.name))


def git(folder: Path, *args: str) -> str | None:
    """What git says; None: it is not installed, or says no."""
    # inside of a hook, or of a rebase, variables would name another repository
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | ALONE
    try:
        found = subprocess.run(
            ["git", *QUIET, *args],
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
