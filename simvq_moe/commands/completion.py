"""`completion`: what a shell completes of this program, from what its commands say by --help."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from simvq_moe.config.flags import parse_flags
from simvq_moe.errors import ConfigError

SHELLS = ("bash", "zsh", "tcsh")
FLAG = re.compile(r"(?:^[ │]+|\[)(--\w[\w.-]*)", re.MULTILINE)
"""A flag in the usage, or at the start of a line of help, in a box or not."""


@dataclass(frozen=True)
class CompletionArgs:
    """Print what makes a shell complete commands, flags and files, to be read at its start."""

    shell: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="|".join(SHELLS))]
    """As in `simvq-moe completion bash > ~/.local/share/bash-completion/completions/simvq-moe`, or
    for zsh into a file _simvq-moe of a folder of its fpath."""


def completion(args: Sequence[str]) -> int:
    """Print what a shell completes."""
    import shtab

    from simvq_moe.cli import COMMANDS

    options = parse_flags(CompletionArgs, args, "simvq-moe completion")
    if options.shell not in SHELLS:
        raise ConfigError(f"completion {options.shell!r} is no shell: use {', '.join(SHELLS)}")
    parser = argparse.ArgumentParser("simvq-moe")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.summary)
        for flag in _flags(command.function):
            # shtab reads this attribute; a value may be a path, as the shell completes any word
            one.add_argument(flag).complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
        one.add_argument("files", nargs="*").complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
    sys.stdout.write(shtab.complete(parser, options.shell))
    return 0


def _flags(function: str) -> list[str]:
    """Those that a command tells by --help, in their order."""
    module, _, name = function.partition(":")
    run = getattr(importlib.import_module(f"simvq_moe.{module}"), name)
    every = ["--help", "all"] if name == "train" else ["--help"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        run(every)
    return list(dict.fromkeys(FLAG.findall(said.getvalue())))
