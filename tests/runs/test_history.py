"""What git is asked of a repository, which may be a stranger's or in use."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from simvq_moe.runs.history import commit, last_change


def git(folder: Path, *args: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *who, *args], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One with a committed file, whose times are others than its index says."""
    folder = tmp_path / "theirs"
    (folder / "simvq_moe").mkdir(parents=True)
    (folder / "simvq_moe/__init__.py").touch()
    (folder / "pyproject.toml").write_text('[project]\nname = "simvq-moe"\n')
    (folder / "sweep.yaml").write_text("title: a\n")
    (folder / ".gitattributes").write_text("*.yaml filter=theirs\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    os.utime(folder / "sweep.yaml", (1e9, 1e9))
    return folder


def test_a_file_that_is_not_as_it_was_committed_has_no_last_change(repository: Path) -> None:
    file = repository / "sweep.yaml"
    found = last_change(file)
    assert found is not None
    assert git(repository, "rev-parse", "HEAD").startswith(found[0])
    file.write_text("title: b\n")
    assert last_change(file) is None
    file.write_text("title: a\n")
    assert last_change(file) == found
    assert last_change(repository / "simvq_moe/__init__.py") is not None
    (repository / "new.yaml").touch()
    assert last_change(repository / "new.yaml") is None


def test_no_program_that_a_repository_names_is_run(repository: Path, tmp_path: Path) -> None:
    program, ran = tmp_path / "program", tmp_path / "ran"
    program.write_text(f'#!/bin/sh\necho "$0 $@" >> {ran}\ncat\n')
    program.chmod(0o755)
    for key in ("core.fsmonitor", "filter.theirs.clean", "gpg.program", "core.sshCommand"):
        git(repository, "config", key, str(program))
    git(repository, "config", "log.showSignature", "true")
    assert last_change(repository / "sweep.yaml") is not None
    # a repository that lacks its trees, and says where they are to be fetched
    for key, value in (
        ("core.repositoryFormatVersion", "1"),
        ("extensions.partialClone", "origin"),
        ("remote.origin.promisor", "true"),
        ("remote.origin.url", "ssh://nowhere/x"),
    ):
        git(repository, "config", key, value)
    tree = git(repository, "rev-parse", "HEAD^{tree}")
    (repository / ".git/objects" / tree[:2] / tree[2:]).unlink()
    assert last_change(repository / "sweep.yaml") is None
    assert not ran.exists(), ran.read_text()


def test_the_index_of_a_checkout_stays_as_it_is(repository: Path) -> None:
    (repository / ".gitattributes").unlink()
    index = repository / ".git/index"
    git(repository, "commit", "--quiet", "--all", "--message", "second")
    os.utime(repository / "sweep.yaml", (1e9, 1e9))
    before = index.read_bytes()
    clean = commit(repository / "simvq_moe")
    assert clean == git(repository, "rev-parse", "--short=12", "HEAD")
    (repository / "sweep.yaml").write_text("title: b\n")
    assert commit(repository / "simvq_moe") == f"{clean}-dirty"
    assert index.read_bytes() == before
